// worker.js: one model in a Web Worker, behind createTrainer (emscripten's, of page.cpp). It takes a step a turn, so that
// what the page asks for in between is heard after the step at work.
"use strict";

let trainer;    // the WebAssembly instance
let step = 0;   // steps finished
let until = 0;  // steps that the page wants
let every = 0;   // steps from one sample to the next; 0: only when asked
let waiting = false;
const turns = new MessageChannel();  // comes back at once; a timer would wait 4 ms
turns.port1.onmessage = turn;

// Calls a function of page.cpp; what it refuses is thrown.
function call(name, types = [], values = []) {
  if (!trainer.ccall(name, "number", types, values)) throw new Error(message());
}
const message = () => trainer.ccall("message", "string", [], []);
function numbers() {
  const first = trainer.ccall("numbers", "number", [], []) / 8;
  return trainer.HEAPF64.slice(first, first + trainer.ccall("number_count", "number", [], []));
}

function goOn() {
  if (!waiting && step < until) {
    waiting = true;
    turns.port2.postMessage(0);
  }
}

function turn() {
  waiting = false;
  if (step >= until) return;
  answer("step", () => {
    call("step");
    step++;
    const values = numbers();
    goOn();
    return { step, values, memory: trainer.HEAPF64.buffer.byteLength };
  });
  if (every && step % every === 0) requests.sample();
}

function answer(kind, make) {
  try {
    const reply = { kind, ...make() };
    postMessage(reply, Object.values(reply).filter(v => ArrayBuffer.isView(v)).map(v => v.buffer));
  } catch (error) {  // a refusal of the trainer, or what WebAssembly gave up at
    if (kind === "step") until = step;
    postMessage({ kind: "refused", asked: kind, text: error.message || String(error) });
  }
}

const requests = {
  // files: name -> text or bytes; words: the command line
  async create({ module, files, words, every: sampleEvery }) {
    every = sampleEvery;
    try {
      trainer = await createTrainer({
        instantiateWasm: (imports, done) => { WebAssembly.instantiate(module, imports).then(done); return {}; },
      });
    } catch (error) {
      return answer("created", () => { throw error; });
    }
    answer("created", () => {
      for (const [name, content] of Object.entries(files)) {
        if (name.includes("/")) trainer.FS.mkdirTree(name.slice(0, name.lastIndexOf("/")));
        trainer.FS.writeFile(name, content);
      }
      call("create", ["string"], [words.join("\n")]);
      return { run: JSON.parse(message()) };
    });
  },
  run(request) {
    until = request.until;
    goOn();
  },
  stop() {
    until = step;
    postMessage({ kind: "stopped", step });
  },
  sample: () => answer("sample", () => {
    call("sample", ["string", "number"], ["\n", 100]);
    return { step, text: message() };
  }),
  attention: ({ sublayer, head }) => answer("attention", () => {
    call("attention", ["number", "number"], [sublayer, head]);
    return { values: numbers() };
  }),
  save: () => answer("saved", () => {
    call("validation_loss");
    const loss = numbers()[0];
    call("save", ["string"], ["model.bin"]);
    return { step, loss, bytes: trainer.FS.readFile("model.bin") };
  }),
};

onmessage = event => requests[event.data.kind](event.data);
