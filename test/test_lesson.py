"""The experiments and the lesson's page: python3 test/test_lesson.py. Ends with `N passed, N failed[, N skipped]`.

The driver runs on tiny models, is interrupted and goes on; the page is built from those tables and from the committed ones, and opened in a
headless Chromium, where its controls are clicked.
"""

import csv
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "dev" / "experiments"), str(ROOT / "test")]
sys.path.append(str(ROOT / "build" / "python"))  # where .ci/run puts playwright

import browser
import depth
import lesson
import max_lr
import order
import report
import shared
import suite
from run import LESSON

RUN = [sys.executable, str(ROOT / "dev/experiments/run.py")]
COMMITTED = ROOT / "dev" / "results" / "lesson"
TEXT = str(ROOT / "keel_common.h")


def has(module):
    return subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True).returncode == 0


def tiny(folder, *words):
    """The command of an experiment's driver, on tiny models and our own text."""
    return [*RUN, *words, "--tiny", "-i", TEXT, "--runs", str(folder / "runs"), "--results", str(folder / "results")]


def succeed(*command):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def fails(*command):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1, f"{command} ended with {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stderr


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


TABLES = {"gradient": ["gradient", "gradient_loss", "gradient_seeds"], "max_lr": ["max_lr", "max_lr_loss"], "depth": ["depth"], "redundancy": ["redundancy"], "hops": ["hops"], "road": ["road", "road_loss", "road_gradient"], "highway": ["highway"],
          "order": ["order", "order_loss"], "alpha": ["alpha_text", "alpha_hops"]}


def check_tables(folder, names):
    for name in names:
        for table in (*TABLES[name], name + "_runs"):
            assert rows(folder / f"{table}.csv"), table
        picture = (folder / f"{name}.png").read_bytes()
        assert picture[:8] == b"\x89PNG\r\n\x1a\n" and len(picture) > 10000, name


def test_experiments(folder):
    """Each experiment writes its tables and its figure; a second time nothing is run, and the tables have the same bytes."""
    names = [name for name in TABLES if has("torch") or name not in ("road", "highway", "order")]
    succeed(*tiny(folder, *names))
    check_tables(folder / "results", names)
    gradient = rows(folder / "results" / "gradient.csv")
    assert {row["norm"] for row in gradient} == set(shared.NORMS) and len(gradient) == 7 * 6 * 4, len(gradient)  # placements, kept steps, sub-layers
    assert all(float(row["dx"]) > 0 for row in gradient)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (folder / "runs").rglob("log.csv")}
    tables = {path: path.read_bytes() for path in (folder / "results").glob("*.csv")}
    again = succeed(*tiny(folder, *names))
    assert "runs are there already" in again and " steps " not in again, again
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (folder / "runs").rglob("log.csv")}
    assert tables == {path: path.read_bytes() for path in (folder / "results").glob("*.csv")}
    if "road" in names:  # from the same bits on the same batches, PyTorch and the trainer differ by FP32's rounding
        differences = [float(row["twin_difference"]) for row in rows(folder / "results" / "road.csv") if row["twin_difference"]]
        assert len(differences) == 2 and max(differences) < 1e-5, differences
        as_it_is = {row["norm"]: row for row in rows(folder / "results" / "order.csv") if row["change"].startswith("as it is")}
        trainer = next(row for row in rows(folder / "results" / "max_lr.csv") if row["norm"] == "keel")  # the same ramp, by the trainer
        assert abs(float(as_it_is["keel"]["lowest_loss"]) - float(trainer["lowest_loss"])) < 0.002 and as_it_is.keys() == {"keel", "pre"}, as_it_is


def strip_times(path):
    return [[row["step"], row["loss"], row["val_loss"]] for row in rows(path)]


def interrupt(process, log):
    """Waits for the tenth step of the log, then asks the process to stop."""
    end = time.time() + 600
    while shared.last_step(log) < 10:
        assert time.time() < end and process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    return process.communicate()


def test_interruption(folder):
    """A run that is interrupted by Ctrl-C goes on and ends with the log of one that was not."""
    settings, log = ["norms=['keel']", "steps=1000", "L=8"], folder / "runs/gradient/keel-1337/log.csv"
    command = [*tiny(folder, "gradient"), "--set", *settings]
    # A shell starts what it runs in the background deaf to Ctrl-C, and children inherit that.
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    _, errors = interrupt(driver, log)
    assert driver.returncode == 1 and "the same command goes on" in errors, errors
    record = json.loads((folder / "runs/gradient/keel-1337.json").read_text())
    assert record["end"] == "interrupted" and 10 <= record["step"] < 1000, record
    succeed(*command)
    succeed(*tiny(folder / "other", "gradient"), "--set", *settings)
    assert strip_times(log) == strip_times(folder / "other/runs/gradient/keel-1337/log.csv") and len(strip_times(log)) == 1000


def test_interruption_in_pytorch(folder):
    """The same of a run of the PyTorch reference."""
    if not has("torch"):
        raise suite.Skip("no PyTorch (Debian: python3-torch)")

    def command(out):
        return [sys.executable, "dev/experiments/train_torch.py", "--form", "attempt2", "-i", TEXT, "-L", "2", "-C", "16", "-t", "16", "-b", "2", "-x", "100", "-P", "50", "-m", "2", "-n", "30", "-y", "-o", str(out)]
    run = subprocess.Popen(command(folder / "a"), cwd=ROOT)
    interrupt(run, folder / "a/log.csv")
    assert run.returncode == 0 and 10 <= len(strip_times(folder / "a/log.csv")) < 100
    succeed(*command(folder / "a"))
    succeed(*command(folder / "b"))
    assert strip_times(folder / "a/log.csv") == strip_times(folder / "b/log.csv") and len(strip_times(folder / "a/log.csv")) == 100
    assert rows(folder / "a/probe.csv") == rows(folder / "b/probe.csv")


def test_rule(folder):
    """The rule that reads a ramp finds what it must in every curve that it was tried on, healthy ones among them; the committed answers are what it says of the committed losses."""
    found = 0
    for table, folders in (("max_lr_recorded", [COMMITTED]), ("max_lr", [COMMITTED]), ("order", [COMMITTED.parent / "order", COMMITTED.parent / "order_1024"])):
        for place in folders:
            losses = rows(place / f"{table}_loss.csv")
            for row in rows(place / f"{table}.csv"):
                name = max_lr.column(row) if table != "order" else order.column(row)
                answer = max_lr.answer(max_lr.curve(losses, name), float(row.get("lr", max_lr.TOP)), float(row["unigram"]))
                assert answer["kind"] == row["kind"], (name, answer)
                if (must := row.get("expected")) == "broken":
                    assert answer["kind"] != "none" and float(answer["holds_until"]) < 0.6 * float(row["lr"]), (name, answer)
                elif must:
                    assert answer["kind"] == must, (name, answer)
                for what in ("gains_until", "holds_until"):  # the losses are rounded to three decimals
                    assert abs(float(answer[what]) - float(row[what])) <= 0.011 * float(row.get("lr", max_lr.TOP)), (name, what, answer)
                found += 1
    assert {row["expected"] for row in rows(COMMITTED / "max_lr_recorded.csv")} == {"none", "stagnation", "broken"} and found > 30
    healthy = [5 - 0.004 * i for i in range(500)]  # and of curves made by hand: what a rise, a flat and a late spike do to a run that learns
    assert max_lr.judge(healthy, 4.9).kind == "none"
    assert max_lr.judge(healthy[:250] + [4.2 + 0.001 * i for i in range(250)], 4.9)[:3] == ("degradation", 0.43, 0.5)  # at 0.43 it is within 1 % of its lowest
    assert max_lr.judge(healthy[:250] + [math.inf] * 250, 4.9).holds == 0.5
    assert max_lr.judge(healthy[:480] + [4.5] * 20, 4.9).kind == "none"  # too short to say that it does not return
    assert max_lr.judge([5.0] * 40 + [4.9] * 460, 4.9)[:3] == ("stagnation", 41 / 500, 41 / 500)
    assert max_lr.judge([4.6] * 10 + [4.9] * 490, 4.9)[:2] == ("stagnation", 10 / 500)  # its only gain is too short for a level


def test_divergence(folder):
    """A run that loses its number is a result; a run that fails otherwise is an error."""
    succeed(*tiny(folder, "depth"), "--set", "steps=40", "L=[2]", "equal=[]", "norms=['keel']", "lrs=[1e9]", "start=[1e9]")
    row, = rows(folder / "results" / "depth.csv")
    assert row["val_loss"] == "inf", row
    failure = fails(*tiny(folder, "gradient"), "--set", "C=15", "norms=['keel']")
    assert "-H" in failure and "expected a divisor" in failure, failure


def test_bad_settings(folder):
    """What the driver cannot do it refuses in a line, and a run of other settings is not taken for this one."""
    assert "expected an experiment of gradient" in fails(*tiny(folder, "gradients"))
    assert "--set: expected KEY=VALUE" in fails(*tiny(folder, "gradient"), "--set", "layers=8")
    assert "--set L: expected one number" in fails(*tiny(folder, "gradient"), "--set", "L=[2,4]")
    succeed(*tiny(folder / "list", "hops"), "--set", "L=[2]", "lrs=[1e-3,3e-3]")  # a list where the experiment has one, whatever others have
    assert {row["lr"] for row in rows(folder / "list/results/hops.csv")} == {"0.001", "0.003"}
    succeed(*tiny(folder / "some", "alpha"), "--set", "L=[8]", "tasks=['text']", "alphas=['sqrt L','L/2']")  # the figure too, where alpha = L is not among them
    assert {row["is"] for row in rows(folder / "some/results/alpha_text.csv")} == {"sqrt L", "L/2"}
    assert "expected a list of 1, 2, sqrt L" in fails(*tiny(folder, "alpha"), "--set", "alphas=['L/3']")
    assert "expected the trainer, found no such file" in fails(*tiny(folder, "gradient"), "--binary", "./no_trainer")
    succeed(*tiny(folder, "gradient"), "--set", "norms=['pre']")
    assert "expected a run of" in fails(*tiny(folder, "gradient"), "--set", "norms=['pre']", "L=6")


def test_sweep(folder):
    """A sweep of learning rates ends with its best tried on both sides, or at the grid's end, and asks for no rate that this does not take."""
    grid = [1, 2, 4, 8, 16, 32]
    for best in range(len(grid)):
        for first in range(len(grid) - 1):
            done, stages = {}, 0
            while missing := [rate for rate in shared.sweep(grid, grid[first:first + 2], done.get) if rate not in done]:
                done.update({rate: abs(grid.index(rate) - best) + 0.1 for rate in missing})
                stages += 1
            at = sorted(grid.index(rate) for rate in done)
            low, high = max(0, min(best - 1, first)), min(len(grid) - 1, max(best + 1, first + 1))
            assert at == list(range(low, high + 1)) and stages <= len(grid), (best, first, at)
    assert shared.sweep(grid, [3], lambda rate: None) == [4, 8] and shared.sweep([5], [3], lambda rate: 1.0) == [5]
    # where all that was tried has diverged it goes on to lower rates
    assert shared.sweep(grid, [8, 16], lambda rate: 1.0 / rate if rate <= 2 else float("inf")) == [1, 2, 4, 8, 16]
    assert shared.sweep(grid, [4, 8], lambda rate: float("inf")) == [1, 2, 4, 8]
    stages = list(shared.staged(iter([[shared.Run("a", []), shared.Run("b", [])], [shared.Run("a", []), shared.Run("c", [])], [shared.Run("c", [])]]).__next__))
    assert [[run.name for run in stage] for stage in stages] == [["a", "b"], ["c"]]


def test_seeds_at_the_best_rate(folder):
    """With sweep_seeds=1 the first seed finds the best rate, the second runs there alone, and that rate is the table's, whatever one seed at another says."""
    succeed(*tiny(folder, "depth"), "--tables", "--set", "seeds=2", "sweep_seeds=1", "L=[2]", "equal=[]", "lrs=[3e-3,1e-2]")
    table = rows(folder / "results" / "depth.csv")
    for norm in ("keel", "pre"):
        mine = [row for row in table if row["norm"] == norm]
        first = [row for row in mine if row["seed"] == mine[0]["seed"]]
        best = min(first, key=lambda row: float(row["val_loss"]))["lr"]
        assert len(first) == 2 and [row["lr"] for row in mine if row not in first] == [best], mine
        lr, mean, low, high = depth.best([{**row, "val_loss": "0" if row["lr"] != best else row["val_loss"]} for row in mine])[norm, 2, 16]
        assert f"{lr:g}" == best and 0 < low <= mean <= high, (lr, mean, low, high)


def test_bound(folder):
    """dev/doc/keel.md's bound (2) on the gradient through the shortcut, and its form for unequal gains, hold for branches that point anywhere, along the stream and against it too."""
    import numpy
    rng = numpy.random.default_rng(1)
    C, closest = 12, 1e9

    def rms(v):
        return math.sqrt(numpy.mean(v * v))
    for trial in range(2000):
        L, unequal = int(rng.integers(2, 9)), trial % 2 == 1
        alpha = rng.uniform(1, 6, L)
        gains = [rng.uniform(0.8, 1.2, C) if unequal else numpy.ones(C) for _ in range(L)]
        x = rng.normal(size=C)
        x /= rms(x)
        forward = []  # of each sub-layer: z, rms(F)
        for l in range(L):
            F = rng.normal(size=C) * rng.choice([0, 0.1, 1]) + x * rng.choice([-1, 0, 1, 3])
            F *= alpha[l] * rng.uniform(0, 0.7 if unequal else 1) / max(rms(F), 1e-9)
            z = alpha[l] * x + F
            forward.append((z, rms(F)))
            x = gains[l] * z / rms(z)
        v = rng.normal(size=C)
        for l in reversed(range(L)):
            z = forward[l][0] / rms(forward[l][0])
            v = gains[l] * v
            v -= z * numpy.mean(v * z)
            if l == L - 1:
                bound = numpy.linalg.norm(v)  # what the first projection leaves
            v *= alpha[l] / rms(forward[l][0])
            m, M = min(gains[l]), max(gains[l - 1]) if l > 0 else 1.0
            bound *= alpha[l] / (alpha[l] * M + forward[l][1])
            if unequal and l < L - 1:
                bound *= math.sqrt(max(0.0, m * m - (forward[l + 1][1] / alpha[l + 1]) ** 2))
        assert numpy.linalg.norm(v) >= bound * (1 - 1e-9), (trial, numpy.linalg.norm(v), bound)
        if not unequal:
            closest = min(closest, numpy.linalg.norm(v) / max(bound, 1e-300))
    assert closest < 1.2, closest  # and it is not idle: some branches come near it


def test_gpu_commands(folder):
    """With --gpu every experiment asks the GPU trainer for deep models, in flags that the CPU trainer, which has the same, takes too."""
    commands = subprocess.run([*RUN, "gradient", "max_lr", "depth", "redundancy", "hops", "--gpu", "--list"], capture_output=True, text=True, cwd=ROOT)
    lines = commands.stdout.splitlines()
    assert commands.returncode == 0 and len(lines) > 50, commands.stderr
    trains = [line for line in lines if " -L " in line]
    assert all(line.startswith("./train_keel ") for line in lines) and any(" -L 1024 " in line for line in trains) and any(" -L 512 " in line for line in trains)
    import shlex
    seen = set()
    for line in trains:
        words = shlex.split(line)
        words[0] = "./train_keel_cpu"
        for flag, value in (("-i", TEXT), ("-L", "2"), ("-C", "64"), ("-x", "0"), ("-u", "0"), ("-v", "0")):  # as small as can be, the rest as it is
            if flag in words:
                words[words.index(flag) + 1] = value
        kind = tuple(word for word in words if word.startswith("-") and not word[1:2].isdigit())
        if kind not in seen:
            seen.add(kind)
            succeed(*words, "-r", "layer", *([] if "--probe" not in words else ["-o", folder / str(len(seen))]))


def test_anchors(folder):
    """The lesson's code is found in the sources; an anchor that is gone, or there twice, ends the build with its name."""
    for name, (_, _, file, function, first, lines) in lesson.CODE.items():
        number, text = lesson.extract(file, function, first, lines)
        assert first in text.split("\n")[0] and text.split("\n")[0] in (ROOT / file).read_text().split("\n")[number - 1], name
    for function, first in (("no such function", "x"), ("void highway_forward(", "no such line"), ("for (int c", "x")):
        try:
            lesson.extract("train_keel_cpu.cpp", function, first)
        except shared.Failure as e:
            assert (first if function.startswith("void") else function) in str(e), e
        else:
            raise AssertionError(f"{function}, {first}: found")


def test_formulas(folder):
    """The formulas' notation becomes MathML, and what it does not know is an error."""
    assert lesson.mathml(r"z_l = α_l x_l") == "<math><mrow><msub><mi>z</mi><mi>l</mi></msub><mo>=</mo><msub><mi>α</mi><mi>l</mi></msub><msub><mi>x</mi><mi>l</mi></msub></mrow></math>"
    assert "<mfrac><mn>1</mn><msqrt><mrow><mn>2</mn></mrow></msqrt></mfrac>" in lesson.mathml(r"\frac{1}{\sqrt{2}}").replace("<mrow><mn>1</mn></mrow>", "<mn>1</mn>").replace("<mrow><msqrt>", "<msqrt>").replace("</msqrt></mrow></mfrac>", "</msqrt></mfrac>")
    assert "<munderover>" in lesson.mathml(r"\prod_{l=1}^{L} x", True)
    for wrong in (r"\nonsense", "x_"):
        try:
            lesson.mathml(wrong)
        except shared.Failure:
            pass
        else:
            raise AssertionError(wrong)


def check_page(page, figures):
    browser.wait(page, "document.documentElement.dataset.drawn")
    assert int(page.evaluate("document.documentElement.dataset.drawn")) == len(figures)
    for name in figures:  # something is drawn in each, inside its frame
        marks = page.evaluate(f"document.querySelectorAll('#plot-{name} .main-svg .trace, #plot-{name} .main-svg image, #plot-{name} .main-svg .point').length")
        size = page.evaluate(f"(r => [r.width, r.height])(document.querySelector('#plot-{name} .main-svg').getBoundingClientRect())")
        assert marks > 0 and size[0] > 200 and size[1] > 200, (name, marks, size)
    # nothing sticks out of the page, and what can be scrolled sideways is narrower than it
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), "the page is wider than the window"
    wide = page.evaluate("[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, pre, .display, svg, math, .plot') && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(e => e.outerHTML.slice(0, 80))")
    assert not wide, wide
    small = page.evaluate("[...document.querySelectorAll('p, li')].filter(e => parseFloat(getComputedStyle(e).fontSize) < 12).length")
    assert small == 0, f"{small} paragraphs under 12 pixels"


def check_controls(page):
    line = "document.getElementById('plot-{}').data.find(t => t.name === '{}')"
    before = page.evaluate(line.format("flow", "Post-LN") + ".y.join()")
    for _ in range(2):
        page.press("#step-flow", "ArrowRight")
    browser.wait(page, f"{line.format('flow', 'Post-LN')}.y.join() !== {json.dumps(before)}")
    browser.wait(page, "document.getElementById('step-flow-is').textContent === 'step ' + D.gradient.steps[2]")
    browser.wait(page, "document.getElementById('step-shortcut').value === '2'")  # the other slider follows
    page.press("#step-flow", "End")
    browser.wait(page, "state.step === D.gradient.steps.length - 1")
    page.press("#step-flow", "Home")
    browser.wait(page, "state.step === 0")
    page.click("#play-flow")  # plays on its own
    browser.wait(page, "state.step >= 2")
    page.click("#play-flow")  # pauses; at the end, where a slow machine may be by now, it plays once more
    browser.wait(page, "document.getElementById('play-flow').getAttribute('aria-pressed') === 'false'")
    for norm in page.evaluate("D.norms"):  # a button for each placement takes its line away, everywhere, and brings it back
        page.click(f"#controls-flow button[data-norm={norm}]")
        browser.wait(page, f"!['flow', 'shortcut', 'loss'].some(n => document.getElementById('plot-' + n).data.some(t => t.name === D.labels.{norm}))")
        browser.wait(page, f"document.querySelector('#controls-loss button[data-norm={norm}]').getAttribute('aria-pressed') === 'false'")
        page.click(f"#controls-loss button[data-norm={norm}]")
        browser.wait(page, f"['flow', 'shortcut', 'loss'].every(n => document.getElementById('plot-' + n).data.some(t => t.name === D.labels.{norm}))")
    for norm in ("keel", "pre"):
        page.click(f"#controls-heat button[data-norm={norm}]")
        browser.wait(page, f"document.getElementById('plot-heat').data[0].z[0][0] === Math.log10(D.gradient.dx.{norm}[0][0])")
    before = page.evaluate("document.getElementById('plot-redundancy').data[0].y.join()")
    page.click("#controls-redundancy button[aria-pressed=false]")
    browser.wait(page, f"document.getElementById('plot-redundancy').data[0].y.join() !== {json.dumps(before)}")
    page.click("#controls-hops button[data-norm=pre]")  # moves both figures
    browser.wait(page, "document.getElementById('plot-hops').data[0].z === D.hops.end.pre && document.getElementById('plot-learning').data[0].y === D.hops.training.pre[0]")
    page.press("#depth-alpha", "ArrowRight")
    browser.wait(page, "state.L === 128 && document.getElementById('plot-alpha').data[1].text[2].startsWith('α = L: 0.996')")


def test_page(folder):
    """The page of the committed results draws every figure at 385 and 1400 pixels, light and dark; its controls work; it asks for nothing but itself and prints no error."""
    path = folder / "lesson.html"
    if not has("plotly"):
        raise suite.Skip("no plotly (Debian: python3-plotly)")
    with browser.chromium() as chromium:
        succeed(sys.executable, ROOT / "dev/experiments/lesson.py", "--results", COMMITTED, "--out", path)
        for width, scheme in ((1400, "light"), (385, "dark")):
            page, errors, requests = browser.open_page(chromium, path, width, scheme)
            check_page(page, lesson.FIGURES)
            check_controls(page)
            assert not errors, errors
            foreign = [url for url in requests if not url.startswith(("file://" + str(path), "data:"))]
            assert not foreign, foreign
            background = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, background[4:-1].split(","))) < 200) == (scheme == "dark"), background
            page.close()
        broken = folder / "broken.html"  # what these checks are worth: an error in the script, and a table that is too wide, are found
        broken.write_text(path.read_text().replace("figures.loss = ", "D.nothing.here; figures.loss = ", 1).replace("<main>", "<main><div style='width: 2000px'>x</div>", 1))
        page, errors, _ = browser.open_page(chromium, broken, 400)
        browser.wait(page, "document.readyState === 'complete'")
        assert any("nothing" in e or "undefined" in e for e in errors), errors
        assert not page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_document(folder):
    """Every table of dev/doc/lesson.md is what report.py prints of the committed results."""
    text = (ROOT / "dev/doc/lesson.md").read_text()
    beside = COMMITTED.parent
    for results, names in ((COMMITTED, (*LESSON, "max_lr_recorded")), (beside / "order", ("order",)), (beside / "order_1024", ("order",)), (beside / "alpha", ("alpha",)), (beside / "alpha_longer", ("alpha",)), (beside / "depth_long", ("depth",)), (beside / "depth_longer", ("depth",)), (beside / "hops_lr", ("hops",))):
        for name in names:
            assert report.markdown(*report.TABLES[name](results)) in text, f"{name} of {results}: dev/doc/lesson.md has another table than report.py prints"
            assert all(row["command"] and row["seed"] for row in rows(results / f"{name.removesuffix('_recorded')}_runs.csv")), (results, name)
    assert report.markdown(*report.TABLES["lr_sweep"](beside)) in text


def test_figures_are_of_the_tables(folder):
    """The committed figures' tables are there with their commands and seeds, and draw again."""
    for path in COMMITTED.glob("*.csv"):
        (folder / path.name).write_bytes(path.read_bytes())
    for name in LESSON:
        assert all(row["command"] and row["seed"] and row["end"] in ("finished", "diverged") for row in rows(folder / f"{name}_runs.csv")), name
    succeed(*RUN, *LESSON, "--draw", "--results", folder)
    check_tables(folder, LESSON)


if __name__ == "__main__":
    sys.exit(suite.main(sys.modules[__name__]))
