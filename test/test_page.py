"""The page that trains in the browser (dev/page): python3 test/test_page.py. Ends with `N passed, N failed[, N skipped]`.

It is built, opened from its file in a headless Chromium, and held against the native trainer with vectors of the same 16 bytes and the same roundings.
"""

import csv
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "test"), str(ROOT / "dev"), str(ROOT / "dev" / "page"), str(ROOT / "dev" / "experiments")]

import browser
import build
import placements
import suite
from browser import wait

NATIVE = ROOT / "build/train_keel_cpu_64bit"
PAGE = ROOT / "build/page.html"
SMALL = "#norms=keel,post&L=8&C=16&T=16&B=1&steps=40"


def make(*targets):
    done = subprocess.run(["make", "-s", *targets], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def native(folder, *flags):
    """What the native trainer prints of a run in a folder of its own."""
    if not (folder / "native").exists():  # beside the sources, which it trains on where no text is given
        shutil.copytree(ROOT / "keel", folder / "native/keel")
        for file in (NATIVE, *(ROOT / name for name in build.sources() if "/" not in name)):
            shutil.copy(file, folder / "native")
    done = subprocess.run([folder / "native" / NATIVE.name, *map(str, flags), "-s", "0"], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Race:
    """The page, opened at an address, whose first step is there. At the end it must have said nothing wrong and asked for nothing."""

    def __init__(self, chromium, address="", width=1400, scheme="light"):
        self.page, self.errors, self.requests = browser.open_page(chromium, PAGE, width, scheme, address)
        self.step(1)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            foreign = [url for url in self.requests if not url.startswith((PAGE.as_uri(), "data:", "blob:"))]
            assert not self.errors and not foreign, (self.errors, foreign)
        self.page.close()

    def step(self, n):
        """Waits until all models have n steps, and none more."""
        wait(self.page, f"racers.length > 0 && racers.every(r => r.step === {n} && r.run) && !running")

    def race_to(self, n):
        self.page.evaluate(f"run({n})")
        self.step(n)

    def of(self, norm, expression):
        return self.page.evaluate(f"(r => {expression})(racers.find(r => r.norm === '{norm}'))")

    def fact(self, name):
        return self.page.evaluate(f"fact('{name}')")

    def text(self, name):
        return self.page.evaluate(f"el('{name}').textContent")

    def drop(self, path):
        self.page.set_input_files("#file", path)


def pages(test):
    """A case that has the page in a browser."""
    def run(folder):
        if not shutil.which("em++"):
            raise suite.Skip("no em++ (Debian: emscripten)")
        with browser.chromium() as chromium:
            make("page", str(NATIVE.relative_to(ROOT)))
            test(chromium, folder)
    run.__doc__ = test.__doc__
    return run


@pages
def test_losses(chromium, folder):
    """Over ten steps the losses of all placements are the native trainer's to 1e-5, and so are the probe's figures."""
    with Race(chromium, f"#norms={','.join(placements.NORMS)}&L=12&steps=10") as race:
        race.race_to(10)
        for norm in placements.NORMS:
            command = next(line for line in race.text("commands").split("\n") if f"--norm {norm} " in line)
            native(folder, *command.split()[1:], "--probe", 1, "-n", 0, "-v", 0, "-o", folder / norm)
            with open(folder / norm / "log.csv") as file:
                losses = [float(row["loss"]) for row in csv.DictReader(file)]
            ours = race.of(norm, "r.loss")
            worst = max(abs(a - b) / b for a, b in zip(ours, losses, strict=True))
            assert len(ours) == 10 and worst < 1e-5, (norm, worst)
            with open(folder / norm / "probe.csv") as file:
                rows = [row for row in csv.DictReader(file) if row["step"] == "10"]
            for name, column in (("dx", "dx_norm"), ("product", "shortcut_gain_to_top"), ("same", "same_x")):
                ours = race.of(norm, f"Array.from(r.depth[9].{name})")
                assert all(abs(a - float(row[column])) < 1e-3 * float(row[column]) for a, row in zip(ours, rows, strict=True)), (norm, name)


@pages
def test_saved_model(chromium, folder):
    """A model saved by the page has its validation loss in train_keel_cpu -e, goes on training there, and writes there what it writes in the page."""
    with Race(chromium, "#norms=keel,hybridnorm&L=8&steps=20") as race:
        race.race_to(20)
        for norm in ("keel", "hybridnorm"):
            with race.page.expect_download() as download:
                race.page.click(f"#row-{norm} button")
            path = folder / download.value.suggested_filename
            download.value.save_as(path)
            loss = float(re.search(r"validation loss is ([\d.]+\d)", race.text("state"))[1])
            command = next(line for line in race.text("commands").split("\n") if "SAVED.bin" in line).split("#")[0]
            words = command.replace("SAVED.bin", str(path)).split()[1:]
            native(folder, *words, "-v", 1, "-n", 0, "-o", folder / norm)
            printed = float(re.search(r"validation \| loss ([\d.]+)", native(folder, *words))[1])
            assert abs(loss - printed) < 6e-5, (norm, loss, printed)
            assert "step 25/25" in native(folder, "-e", path, "-b", 4, "-x", 25, "-v", 0), norm
            wait(race.page, f"racers.find(r => r.norm === '{norm}').sample")
            written = subprocess.run([folder / "native" / NATIVE.name, "-e", path, "--prompt", "\n", "-g", "100"], capture_output=True, text=True).stdout
            assert race.of(norm, "r.sample") in written and race.of(norm, "r.sampledAt") == 20, (race.of(norm, "r.sample"), written)


@pages
def test_tour(chromium, folder):
    """Each stop of the tour sets the controls, runs to its step and reaches the state that it speaks of."""
    with Race(chromium) as race:
        found = {}
        for at, (until, layers) in enumerate(((1, 64), (50, 64), (50, 64), (50, 64), (150, 32), (40, 128))):
            if at == 0:
                race.page.click("#stops button")
            else:
                race.page.click("#next")
            race.step(until)
            wait(race.page, "!document.querySelector('#tour-text').textContent.includes('–')")
            assert race.page.evaluate("settings.L") == layers and race.page.evaluate("el('stops').querySelectorAll('[aria-pressed=true]').length") == 1
            found[at] = {norm: {what: race.fact(f"{norm}.{what}") for what in ("ratio", "product", "same", "loss")} for norm in race.page.evaluate("settings.norms")}
            wait(race.page, "[...document.querySelectorAll('#tour-text output')].every(o => o.innerHTML === numberHtml(fact(o.dataset.fact)))")
        new, fifty, why, one, rate, deep = (found[at] for at in range(6))
        assert new["post"]["ratio"] > 0.1 and new["keel"]["ratio"] > 0.1 and new["post"]["product"] < 1e-5 and new["keel"]["product"] > 0.9, new
        assert fifty["post"]["ratio"] < 1e-6 and fifty["keel"]["ratio"] > 0.1 and fifty["post"]["same"] > fifty["keel"]["same"], fifty
        assert why["scaledpost"]["ratio"] > 0.1 and why["keel"]["ratio"] > 0.1 and why["post"]["ratio"] < 1e-6, why
        assert one["keel"]["ratio"] < 1e-4 and race.page.evaluate("ALPHAS[el('alpha').value]") == 0, one  # and the stop after it has put alpha back
        assert rate["post"]["ratio"] < 1e-4 and min(rate[norm]["ratio"] for norm in ("pre", "keel")) > 0.05, rate
        assert deep["post"]["ratio"] < 1e-6 and deep["keel"]["ratio"] > 0.05 and deep["pre"]["ratio"] > 0.05, deep
        print({at: {norm: f"{facts['ratio']:.1e}" for norm, facts in found[at].items()} for at in found})
        race.page.keyboard.press("[")
        wait(race.page, "tour.at === 4")
        race.page.click("#stops button:nth-child(4)")
        race.step(50)
        wait(race.page, "el('tour-note').hidden && !el('tour-text').textContent.includes('–')")
        wait(race.page, "[...document.querySelectorAll('#tour-text output')].every(o => o.innerHTML === numberHtml(fact(o.dataset.fact)))")
        said = race.page.evaluate("el('tour-text').innerHTML")
        race.page.click("[data-try='alpha=16']")  # another race leaves the stop's words and numbers as they were, and says so
        wait(race.page, "settings.alpha === 16 && racers.length === 2 && racers.every(r => r.step === 50 && r.run.alpha === (r.norm === 'keel' ? 16 : 1)) && !running")
        assert race.fact("keel.ratio") > 1e-3 and race.page.evaluate("el('tour-text').innerHTML") == said and "α 16" in race.text("tour-note"), race.text("tour-note")


@pages
def test_controls(chromium, folder):
    """Every control does what it says; the address holds all settings and opens the same race."""
    with Race(chromium, SMALL) as race:
        page = race.page
        page.click("#more summary")
        for norm in placements.NORMS:  # a button for each placement puts it into the race, and takes it out
            there = norm in ("keel", "post")
            page.click(f"#norm-{norm}")
            wait(page, f"racers.some(r => r.norm === '{norm}') === {str(not there).lower()} && racers.every(r => r.step === 1)")
            page.click(f"#norm-{norm}")
            wait(page, f"racers.some(r => r.norm === '{norm}') === {str(there).lower()} && racers.every(r => r.step === 1)")
        for name, value in (("L", 10), ("C", 32), ("lr", 0.007), ("alpha", 128)):  # a slider's next value is the model's
            page.press(f"#{name}", "ArrowLeft" if name == "alpha" else "ArrowRight")
            wait(page, f"settings.{name} === {value} && racers.length === 2 && racers.every(r => r.step === 1 && r.run?.{name} === ('{name}' === 'alpha' && r.norm === 'post' ? 1 : {value}))")
        for name, value in (("T", "32"), ("B", "2")):
            page.select_option(f"#{name}", value)
            wait(page, f"racers.length === 2 && racers.every(r => r.step === 1 && r.run?.{name} === {value})")
        for name, value in (("steps", "12"), ("warmup", "3"), ("seed", "7"), ("every", "5")):
            page.fill(f"#{name}", value)
            page.press(f"#{name}", "Enter")
            wait(page, f"settings.{name} === {value} && racers.length === 2 && racers.every(r => r.step === 1)")
        wait(page, "racers.every(r => r.run?.warmup === 3 && r.run?.steps === 12)")
        page.fill("#seed", "-1")
        page.press("#seed", "Enter")
        wait(page, "settings.seed === 7")  # what the field does not allow is not taken
        address = page.evaluate("location.hash")
        assert address == "#L=10&T=32&B=2&lr=0.007&alpha=128&warmup=3&steps=12&seed=7&every=5&stop=1", address
        loss = race.of("keel", "r.loss[0]")
        page.click("#one")
        race.step(2)
        page.click("#go")
        race.step(12)
        wait(page, "el('state').textContent.startsWith('finished') && racers.every(r => r.sample.length > 50 && r.sampledAt === 12)")
        page.click("#go")
        assert "has its 12 steps" in race.text("state")
        page.click("#link")
        wait(page, "el('state').textContent.includes('link') || el('state').textContent.includes('address')")
        page.click("#reset")
        race.step(1)
        assert race.of("keel", "r.loss[0]") == loss
        page.keyboard.press(".") if page.evaluate("document.activeElement.blur() || true") else None
        race.step(2)
        for canvas in ("loss", "flow", "product", "same"):  # charts, by keys and by pointer
            page.focus(f"#{canvas}")
            page.press(f"#{canvas}", "ArrowRight")
            wait(page, f"pointers.{canvas} === {1 if canvas == 'loss' else 0}")
            page.hover(f"#{canvas}")
            wait(page, f"pointers.{canvas} > 0")
        before = page.evaluate("el('attention').toDataURL()")
        page.select_option("#who", "post")
        page.press("#sublayer", "ArrowRight")
        page.select_option("#head", "1")
        wait(page, f"racers.find(r => r.norm === 'post').attention && el('attention').toDataURL() !== {before!r}")
        sums = race.of("post", "Array.from({length: 32}, (_, q) => r.attention.slice(32 * q, 32 * q + 32).reduce((a, b) => a + b))")
        assert all(abs(s - 1) < 1e-5 for s in sums), sums
        wait(page, "describe() || ['loss', 'flow', 'product', 'same', 'heat-post', 'attention'].every(id => el(id).getAttribute('aria-label').length > 20)")
    with Race(chromium, "#norms=hybridnorm&L=8&C=32&T=32&B=2&warmup=0&lr=0.03&steps=2") as race:  # the gains of q and k have moved since
        race.race_to(2)
        wait(race.page, "racers[0].attention")
        sums = race.of("hybridnorm", "Array.from({length: 32}, (_, q) => r.attention.slice(32 * q, 32 * q + 32).reduce((a, b) => a + b))")
        assert all(abs(s - 1) < 1e-12 for s in sums), sums
    with Race(chromium, address) as race:
        assert race.of("keel", "r.loss[0]") == loss and race.page.evaluate("settings.seed") == 7
    with Race(chromium, "#norms=keel,gpt&L=7&C=32&rate=1&seed=x") as race:  # what is wrong is told, what is right is taken
        assert all(word in race.text("alert") for word in ("norms=keel,gpt", "L=7", "rate=1", "seed=x")) and "C=32" not in race.text("alert")
        assert race.page.evaluate("settings.norms.length === 2 && settings.L === 64 && settings.C === 32")


@pages
def test_text(chromium, folder):
    """A text of the reader's own is trained on; a file that is refused leaves the one before it, with the trainer's own words."""
    (folder / "my text.txt").write_text("to be or not to be, that is the question\n" * 200)
    (folder / "photo.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(5000))
    (folder / "short.txt").write_text("to be")
    (folder / "empty.txt").write_text("")
    (folder / "tmp").write_text("names that a file system has of its own, ".join("abcdefgh") * 20)
    with Race(chromium, SMALL) as race:
        before = race.of("keel", "r.loss[0]")
        race.page.click("#more summary")
        race.drop(folder / "my text.txt")
        wait(race.page, f"racers.length === 2 && racers.every(r => r.step === 1) && racers[0].loss[0] !== {before}")
        assert "my text.txt, 8200 bytes" in race.text("text-is") and "-i 'my text.txt'" in race.text("commands")
        loss = race.of("keel", "r.loss[0]")
        printed = native(folder, "--norm", "keel", *"-L 8 -C 16 -H 1 -t 16 -b 1 -x 1 -u 1 --seed 1337 -v 0".split(), "-i", "my text.txt")
        assert abs(loss - float(re.search(r"step 1/1 \| loss ([\d.]+)", printed)[1])) < 6e-5, (loss, printed)
        for name, words in (("photo.png", "expected text"), ("short.txt", "expected at least"), ("empty.txt", "empty")):
            race.drop(folder / name)
            wait(race.page, f"el('alert').textContent.includes({name!r}) && racers.length === 2 && racers.every(r => r.step === 1)")
            assert words in race.text("alert") and "my text.txt" in race.text("text-is"), race.text("alert")
            assert race.of("keel", "r.loss[0]") == loss
        race.page.evaluate("""(data => {
            data.items.add(new File(["so long as men can breathe or eyes can see, ".repeat(100)], "dropped.txt"));
            document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
        })(new DataTransfer())""")
        wait(race.page, "el('text-is').textContent.startsWith('dropped.txt, 4400 bytes') && racers.length === 2 && racers.every(r => r.step === 1)")
        race.drop(folder / "tmp")
        wait(race.page, "el('text-is').textContent.startsWith('tmp,') && racers.length === 2 && racers.every(r => r.step === 1)")
        race.page.click("#own")
        wait(race.page, f"racers.length === 2 && racers.every(r => r.step === 1) && racers[0].loss[0] === {before}")


@pages
def test_pause_and_stop(chromium, folder):
    """Pause leaves all models at one step and goes on; Stop acts after the step at work, and ends a worker whose step takes longer than 200 ms."""
    with Race(chromium, SMALL.replace("steps=40", "steps=10000")) as race:
        page = race.page
        page.click("#go")
        wait(page, "racers.every(r => r.step > 20)")
        drawn = page.evaluate("drawings.count")
        page.click("#go")
        wait(page, "!running && new Set(racers.map(r => r.step)).size === 1 && racers.every(r => r.asked === r.step)")
        assert drawn > 1
        at = race.of("keel", "r.step")
        for _ in range(10):
            page.click("#go")
            wait(page, f"racers.every(r => r.step > {at + 2})")
            page.click("#go")
            wait(page, "!running && new Set(racers.map(r => r.step)).size === 1 && racers.every(r => r.asked === r.step)")
            at = race.of("keel", "r.step")
        page.click("#go")
        wait(page, f"racers.every(r => r.step > {at + 20})")
        page.dblclick("#stop", force=True)
        wait(page, "racers.every(r => !r.stopping)")
        at = page.evaluate("racers.map(r => r.step)")
        page.wait_for_timeout(300)
        assert page.evaluate("racers.map(r => r.step)") == at and page.evaluate("racers.every(r => r.state === 'ready')")
    race = Race(chromium, SMALL)
    with race:
        race.page.evaluate("location.hash = '#norms=keel&L=64&C=128&T=128&B=16'")  # seconds a step
        wait(race.page, "racers.length === 1 && racers[0].state === 'ready'")
        race.page.click("#stop")
        wait(race.page, "racers[0].state === 'ended'")
        assert "middle of a step" in race.text("alert") and race.page.evaluate("racers[0].step") == 0
        race.page.evaluate(f"location.hash = '{SMALL}'")
        race.step(1)  # and a new race starts
        assert race.text("alert") == ""


@pages
def test_broken_runs(chromium, folder):
    """A rate at which nothing is finite any more ends a model with the trainer's words, and the others go on; a shape that is too large is refused."""
    with Race(chromium, SMALL.replace("steps=40", "steps=60")) as race:
        race.page.evaluate("settings.lr = 1e9; startRace(1)")
        race.step(1)
        race.page.evaluate("run(40)")
        wait(race.page, "racers.some(r => r.state === 'ended') || racers.every(r => r.step === 40)")
        race.page.evaluate("settings.lr = 5e-3; settings.C = 100000; settings.L = 1000; startRace(1)")
        wait(race.page, "racers.every(r => r.state === 'ended')")
        assert "memory" in race.text("alert"), race.text("alert")


@pages
def test_sources(chromium, folder):
    """Each formula's button opens its file at its line; the sources are those of the project; no network can be asked."""
    with Race(chromium, SMALL) as race:
        page = race.page
        buttons = page.evaluate("[...document.querySelectorAll('#formulas [data-line]')].map(b => [b.dataset.file, +b.dataset.line])")
        assert len(buttons) == len(build.FORMULAS)
        for (file, line), (_, _, _, _, anchor) in zip(buttons, build.FORMULAS.values(), strict=True):
            page.click(f"#formulas [data-file='{file}'][data-line='{line}']")
            marked = page.evaluate("document.querySelector('dialog[open] mark').textContent")
            assert anchor in marked and marked.strip() == (ROOT / file).read_text().split("\n")[line - 1].strip(), (file, line, marked)
            page.keyboard.press("Escape")
        page.click("#tour-text [data-line]")
        assert "alpha" in page.evaluate("document.querySelector('dialog[open] mark').textContent")
        page.keyboard.press("Escape")
        assert page.evaluate("D.files") == build.sources()
        assert page.evaluate("fetch('https://example.com').then(() => 'asked', () => 'refused')") == "refused"
        assert any("Content Security Policy" in e for e in race.errors)
        race.errors.clear(), race.requests.clear()
    assert PAGE.stat().st_size < 3e6


@pages
def test_widths(chromium, folder):
    """Nothing sticks out from 360 to 1400 pixels, dark and light, and all is drawn; no text is under 12 pixels."""
    for width, scheme in ((360, "dark"), (385, "light"), (700, "dark"), (1400, "light")):
        with Race(chromium, "#norms=" + ",".join(placements.NORMS) + "&L=8&C=16&T=16&B=1&steps=20", width, scheme) as race:
            race.race_to(20)
            page = race.page
            page.evaluate("el('knobs').open = el('more').open = true")
            wait(page, "drawings.count > 2 && racers.some(r => r.attention)")
            page.wait_for_timeout(200)
            assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), width
            wide = page.evaluate("[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, pre, math, dialog') && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(e => e.outerHTML.slice(0, 80))")
            assert not wide, (width, wide)
            small = page.evaluate("[...document.querySelectorAll('p, label, button, td, th, figcaption')].filter(e => e.offsetWidth && parseFloat(getComputedStyle(e).fontSize) < 12).map(e => e.outerHTML.slice(0, 80))")
            assert not small, (width, small)
            blank = page.evaluate("[...document.querySelectorAll('canvas')].filter(c => !c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(v => v)).map(c => c.id)")
            assert not blank, (width, blank)
            nameless = page.evaluate("[...document.querySelectorAll('input, select, button')].filter(e => !(e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim())).map(e => e.outerHTML)")
            assert not nameless, nameless
            background = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, background[4:-1].split(","))) < 200) == (scheme == "dark"), background


if __name__ == "__main__":
    sys.exit(suite.main(sys.modules[__name__]))
