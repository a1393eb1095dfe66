"""Turn text, JSONL, Parquet, chats or preferences into one file of token ids to train on.

python prepare.py from=<file, folder or glob> to=corpus.h5      then: train.py data=h5 data.path=corpus.h5
python prepare.py from=chats.jsonl to=chats.h5 kind=chats tokenizer=file tokenizer.path=runs/<run>/artifacts/export"""

from etude.cli import main


@main("prepare")
def prepare(cfg: dict) -> int:
    from etude.preparing import run

    return run(cfg)


if __name__ == "__main__":
    prepare()
