#!/usr/bin/env python3
"""FineWeb-Edu's samples of 10 or 100 billion tokens, as token shards, by default of GPT-2's vocabulary.

    pip install huggingface_hub pyarrow tiktoken
    python3 data/fineweb_edu.py                      sample-10BT into data/fineweb_edu_10BT/
    python3 data/fineweb_edu.py --max-files 1        its first parquet file only, about 0.7 billion tokens

Fetches the sample's parquet files (10BT: 14 of 2 GB) from the Hugging Face Hub, each when its turn comes, and
tokenizes them in all cores. The order of the documents is that of the files and of their rows, always the same.
Needs 2 GB of disk for each file and 2 for each billion tokens; OUT/parquet may go when the shards are done.

    fineweb_edu_val_000000.bin          the first 100 million tokens, for validation
    fineweb_edu_train_000001.bin ...    all others
    tokenizer.bin                       the vocabulary

An interrupted run goes on, downloads included, when the same command is given again. The first run notes the
data set's revision, and later ones keep to it.
"""

import argparse
import json
import os

import shards
import tokenizer

REPOSITORY = "HuggingFaceFW/fineweb-edu"


def noted_revision(folder, prefix):
    try:
        with open(os.path.join(folder, prefix + "_progress.json"), encoding="utf-8") as file:
            return json.load(file)["settings"]["revision"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # no run yet; what is wrong with the file is for ShardWriter to say


def ask_hub(function, *arguments, **options):
    try:
        return function(*arguments, **options)
    except Exception as error:  # the hub's library passes on the errors of whichever HTTP library it stands on
        raise shards.DataError(
            f"the Hugging Face Hub: {error}: the same command goes on; without a network, fetch the files elsewhere"
            " and give them with --local"
        ) from None


def list_files(hub, sample, revision):
    """Return (revision's commit, [(path, bytes)]) of the sample's parquet files, in order."""
    api = hub.HfApi()
    commit = ask_hub(api.dataset_info, REPOSITORY, revision=revision).sha
    entries = ask_hub(lambda: list(api.list_repo_tree(
        REPOSITORY, path_in_repo=f"sample/{sample}", recursive=True, revision=commit, repo_type="dataset")))
    files = sorted((entry.path, entry.size) for entry in entries if entry.path.endswith(".parquet"))
    if not files:
        raise shards.DataError(f"{REPOSITORY} at {commit} has no parquet files in sample/{sample}: choose another --revision")
    return commit, files


def write_sample(args, tok):
    hub = shards.import_or_explain("huggingface_hub", "huggingface_hub pyarrow tiktoken")
    shards.import_or_explain("pyarrow.parquet", "huggingface_hub pyarrow tiktoken")
    commit, files = list_files(hub, args.sample, args.revision or noted_revision(args.out, args.prefix))
    files = files[: args.max_files]

    def fetch(path):  # huggingface_hub goes on with a broken download and returns at once for a whole one
        return ask_hub(hub.hf_hub_download, REPOSITORY, path, repo_type="dataset", revision=commit,
                       local_dir=os.path.join(args.out, "parquet"))

    paths, sizes = [path for path, _ in files], [size for _, size in files]
    settings = {"dataset": REPOSITORY, "sample": args.sample, "revision": commit, "files": len(files)}
    tokenizer.write_text_shards(tok, args, settings, lambda start: shards.read_pieces(paths, sizes, start, fetch))


def main():
    parser = shards.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", choices=["10BT", "100BT"], default="10BT", help="default: %(default)s")
    parser.add_argument("--revision", metavar="COMMIT", help="the data set's (default: as noted by the run in DIR, else the newest)")
    parser.add_argument("--max-files", metavar="N", type=shards.positive, help="only the first N parquet files (default: all)")
    parser.add_argument("--local", metavar="FILE", type=shards.glob_argument, nargs="+", help="text, .jsonl or .parquet files to take instead of fetching")
    parser.add_argument("--tokenizer", metavar="NAME|FILE", type=shards.path_argument, default="gpt2",
                        help="a tokenizer file, or what tokenizer.py import takes (default: %(default)s)")
    folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), "fineweb_edu_SAMPLE")
    shards.add_writer_options(parser, folder, "fineweb_edu", None)
    tokenizer.add_workers_option(parser)
    args = parser.parse_args()
    args.out = args.out.replace("SAMPLE", args.sample) if args.out == folder else args.out
    args.val_tokens = args.shard_tokens if args.val_tokens is None else args.val_tokens
    tok = tokenizer.load(args.tokenizer)
    if args.local:
        tokenizer.write_file_shards(tok, args, shards.globbed(args.local))
    else:
        write_sample(args, tok)


if __name__ == "__main__":
    shards.run(main)
