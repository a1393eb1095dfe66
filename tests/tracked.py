"""What trackers hold of a run, each by its own reader: python tracked.py RUN TRACKERS TIMES prints JSON, after syncing the run
so many times. A process of its own, as these libraries warn of all kinds of things."""

import json
import struct
import sys
from pathlib import Path
from typing import Any

Content = dict[str, Any]


def tensorboard(run: Path) -> Content:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.metadata import parse_session_end_info_plugin_data as parse_end
    from tensorboard.plugins.hparams.metadata import parse_session_start_info_plugin_data as parse_start
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(run / "logs/tensorboard"), size_guidance=dict.fromkeys(("scalars", "histograms"), 0))
    events.Reload()
    tags = events.Tags()
    texts = [t for t in tags["tensors"] if t.endswith("/text_summary")]
    hparams = events.PluginTagToContent("hparams")
    settings = parse_start(hparams["_hparams_/session_start_info"]).hparams
    return {
        "scalars": [[n, e.step, e.value] for n in tags["scalars"] for e in events.Scalars(n)],
        "texts": [[n, e.step, make_ndarray(e.tensor_proto)[0].decode()] for n in texts for e in events.Tensors(n)],
        "histograms": [
            [n, e.step, e.histogram_value.bucket, e.histogram_value.min, e.histogram_value.max]
            for n in tags["histograms"]
            for e in events.Histograms(n)
        ],
        "images": tags["images"],
        "hparams": {k: v.number_value if v.HasField("number_value") else v.string_value for k, v in settings.items()},
        "status": parse_end(hparams["_hparams_/session_end_info"]).status,
    }


def wandb(run: Path) -> Content:
    """A .wandb file: 7 bytes of its own, then the log format of LevelDB (blocks of 32 KiB) with records of W&B's Protobuf."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows, config = [], {}
    [path] = run.glob("logs/wandb/offline-run-*/*.wandb")
    data, at, part = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or its last part
            record, part = Record.FromString(part), b""
            if record.HasField("history"):
                row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                rows += [[n, row["_step"], v] for n, v in row.items() if n[0] != "_"]
            if record.HasField("run"):
                config = {i.key: json.loads(i.value_json) for i in record.run.config.update}
                config["group"] = record.run.run_group
    html = [p.read_text() for p in path.parent.glob("files/media/html/**/*.html")]
    objects = {n.rsplit("/", 1)[0] for n, _, v in rows if v in ("histogram", "html-file")}
    plain = [r for r in rows if r[0].rsplit("/", 1)[0] not in objects]
    counts = [[n.removesuffix("/values"), s, v] for n, s, v in rows if n.endswith("/values")]
    return {"scalars": plain, "histograms": counts, "html": sorted(html), "config": config, "id": path.stem}


def aim(run: Path) -> Content:
    from aim import Repo
    from aim.sdk.types import QueryReportMode

    repo, where = Repo(str(run.parent)), (f"run.name == '{run.name}'", QueryReportMode.DISABLED)
    [found] = [c.run for c in repo.query_runs(where[0], report_mode=where[1]).iter_runs()]
    tables = [(m.name, m.dataframe()) for c in repo.query_metrics(*where).iter_runs() for m in c]
    texts = [(t.name, t.data.items()) for c in repo.query_texts(*where).iter_runs() for t in c]
    shapes = [(d.name, d.data.items()) for c in repo.query_distributions(*where).iter_runs() for d in c]
    return {
        "scalars": [[n, int(s), float(v)] for n, t in tables for s, v in zip(t["step"], t["value"])],
        "texts": [[n, s, v[0].data] for n, items in texts for s, v in items],
        "histograms": [
            [n, s, v[0].to_np_histogram()[0].tolist(), *v[0].range] for n, items in shapes for s, v in items
        ],
        "config": found["config"],
        "status": found["status"],
    }


def mlflow(run: Path) -> Content:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{run.parent}/mlflow.db")
    ident = (run / "meta/mlflow_id").read_text().strip()
    held = client.get_run(ident)
    points = [[k, m.step, m.value] for k in held.data.metrics for m in client.get_metric_history(ident, k)]
    return {"scalars": points, "params": held.data.params, "status": held.info.status}


if __name__ == "__main__":
    path, names, times = Path(sys.argv[1]).resolve(), sys.argv[2].split(","), int(sys.argv[3])
    for name in [n for n in names for _ in range(times)]:  # at once after each other, which caches might not bear
        from etude.track import main

        assert main(["sync", str(path), f"to={name}"]) == 0
        if (resumed := path / "logs" / "resumed.jsonl").exists():
            resumed.replace(path / "logs" / "metrics.jsonl")
    print(json.dumps({name: globals()[name](path) for name in names}))
