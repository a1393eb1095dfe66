"""How fast, and against whom.

    python bench.py experiment=nanogpt_cpu data.path=FILE            train and decode this model
    python bench.py what=train compare='python train.py ...'         in turn with another program

Prints a table and one line of JSON."""

from etude.cli import main


@main("bench")
def bench(cfg: dict) -> int:
    from etude.bench import run

    return run(cfg)


if __name__ == "__main__":
    bench()
