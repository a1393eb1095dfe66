"""Train a model: compose the config, build its parts, run the loop.

python train.py                                    a small model on Python's own source, about three minutes
python train.py model=gpt data=text data.path=FILE
python train.py resume=runs/<run>                  go on after a stop
python train.py --help                             all groups and keys"""

from etude.cli import main


@main("train")
def train(cfg: dict) -> int:
    from etude.training import train

    return train(cfg)


if __name__ == "__main__":
    train()
