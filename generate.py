"""Text from a trained model.

python generate.py ckpt=runs/<run> prompt="def "         one prompt, streamed
python generate.py ckpt=runs/<run> file=prompts.txt n=4  many, decoded together
echo "class A" | python generate.py ckpt=runs/<run>      from standard input
python generate.py ckpt=runs/<run>                       a session: type, read, type again"""

from etude.cli import main


@main("generate")
def generate(cfg: dict) -> int:
    from etude.infer.session import run

    return run(cfg)


if __name__ == "__main__":
    generate()
