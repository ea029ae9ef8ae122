"""The data of our own tasks for the harness: hops:K, on whose programs a trainer validates, and text:FILE."""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "reference"))
from keel import philox4x32_10

STREAM_PROGRAMS = 5


class Documents(list):
    """Dicts of the same keys: what the harness asks of a datasets.Dataset. A Dataset takes a checksum of itself by way of
    dill, which fails where packages lie in a folder of another name than site-packages."""

    @property
    def features(self):
        return self[0]


# ------------------------------------------------------------------------------------------------
# hops:K


class Programs:
    """HopPrograms of keel/hops.h, which describes the programs."""

    def __init__(self, hops):
        self.hops, self.variables = hops, 2 * hops + 1
        self.queries = min(4 * hops, hops * self.variables)
        self.length = 4 * (self.variables + self.queries)

    def sequence(self, seed, s, validation, n):
        """(sequence s as n characters, the first answer of each of its programs as [(position, lookups)]): the answer to
        the characters up to `position` is the one after them."""
        programs = n // self.length
        drawn = programs * (2 * self.variables + self.queries)
        block = np.arange((drawn + 3) // 4) | int(validation) << 31
        words = philox4x32_10((s & 0xFFFFFFFF, s >> 32, block, STREAM_PROGRAMS), (seed & 0xFFFFFFFF, seed >> 32))
        words = iter(np.stack(words, axis=-1).reshape(-1).tolist())

        def permutation(size, count):  # a random order of [0, size), of which only the first `count` places are shuffled
            order = list(range(size))
            for i in range(count):
                j = i + (next(words) * (size - i) >> 32)
                order[i], order[j] = order[j], order[i]
            return order

        text, answers = "", []
        for _ in range(programs):
            letter = permutation(self.variables, self.variables)
            name = lambda place: chr(ord("a") + letter[place % self.variables])
            for i in permutation(self.variables, self.variables):
                text += name(i) + name(i + 1) + name(i) + ";"
            asked = permutation(self.hops * self.variables, self.queries)[:self.queries]
            answers.append((len(text) + 1, asked[0] % self.hops + 1))
            queries = [(place // self.hops, place % self.hops + 1) for place in asked]
            text += ";".join(f"{lookups}{name(place)}{name(place + lookups)}" for place, lookups in queries) + "\n"
        return text.ljust(n, "\n"), answers


def hops(hops, pretrained, sequences=None, seed=1337, T=None, **_):
    """What a run of --train hops:K that starts from the model in the folder `pretrained` validates on; its defaults, where
    sequences, seed and T are not given."""
    config = json.loads((Path(pretrained) / "config.json").read_text())
    programs, max_T = Programs(hops), config["max_position_embeddings"]
    least = programs.length - 1
    sequences = sequences or 16 * 16 * max(1, config["hidden_size"] // 64)  # -m's 16 batches of default_total_batch
    T = T or max_T
    if config["vocab_size"] != 256 or config["tokenizer_crc32"]:
        raise ValueError(f"hops:{hops}: expected a model of bytes, as programs are made of characters, found one with a tokenizer")
    if max_T < least:
        raise ValueError(f"hops:{hops}: expected a model of at least {least} positions, as a program has, found {max_T}; "
                         "give a smaller K")
    if not least <= T <= max_T:
        raise ValueError(f"hops:{hops}: expected T from {least}, a program, to {max_T}, the model's positions, found {T}")
    rows = Documents()
    for s in range(sequences):
        text, answers = programs.sequence(seed, s, True, T + 1)
        rows += [{"context": text[:at + 1], "answer": text[at + 1], "lookups": lookups, "hops": hops} for at, lookups in answers]
    return {"test": rows}


def results(doc, likelihoods):
    """{metric: value} of a query. The harness wants each metric of every query; `accuracy` leaves out those of other lookups."""
    (_, is_greedy), = likelihoods
    return {"acc": int(is_greedy), **{f"acc_{h}_lookups": (int(is_greedy), h == doc["lookups"]) for h in range(1, doc["hops"] + 1)}}


def accuracy(values):
    right = [is_right for is_right, is_counted in values if is_counted]
    return sum(right) / len(right) if right else float("nan")


# ------------------------------------------------------------------------------------------------
# text:FILE


def text(text, **_):
    """The harness predicts every token of it, the first from a token of its own: the one between documents, or byte 0 where
    the vocabulary is bytes, which such a model has never seen. Its windows of T tokens, the model's positions, follow each
    other and share no context; only the last one reaches back into the one before it, to be full.

    The trainer's val_bits_per_byte on -j FILE lies close. With a tokenizer its text, too, begins with the token between
    documents and its windows are the same, but it leaves out what is left over at the end, and what is beyond -m batches.
    Without one its windows begin a byte later, and the first byte is not predicted."""
    with open(text, "rb") as file:
        content = file.read()
    try:
        content = content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"text:{text}: expected UTF-8, found another byte at {error.start}") from None
    if not content or "\0" in content:
        raise ValueError(f"text:{text}: expected text, found " + ("a zero byte" if content else "an empty file"))
    return {"test": Documents([{"text": content}])}
