"""A model behind the APIs of OpenAI and Anthropic, and a chat page.

python serve.py ckpt=runs/<run>                            at http://127.0.0.1:8000
python serve.py ckpt=runs/<run> port=0 served_name=mine    any free port, under another name
ETUDE_API_KEYS=... python serve.py ckpt=runs/<run> host=0.0.0.0     for other machines"""

from etude.cli import main


@main("serve")
def serve(cfg: dict) -> int:
    from etude.serve.start import run

    return run(cfg)


if __name__ == "__main__":
    serve()
