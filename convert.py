"""Bring a pretrained model in, or take a trained one out.

python convert.py from=<Hugging Face folder> to=runs/<name>   then: generate.py ckpt=runs/<name>
python convert.py from=<file.gguf> to=runs/<name>             the same
python convert.py from=runs/<run> to=<folder>                 for transformers' from_pretrained"""

from etude.cli import main


@main("convert")
def convert(cfg: dict) -> int:
    from etude.interop.convert import run

    return run(cfg)


if __name__ == "__main__":
    convert()
