"""logs/tensorboard of a run: `tensorboard --logdir runs`. Written without torch, which would take seconds to import."""

import io
import time
from pathlib import Path
from typing import Any

from etude.run import flat
from etude.track import Bins
from etude.trackers import status_of

ASIDE = ("tracker", "progress", "runs_dir", "cache_dir", "trusted")  # say nothing of what a run finds
SHOWN = (
    "val/full_loss",
    "val/loss",
    "train/loss",
    "val/full_bits_per_byte",
)  # beside the settings, in the HParams page


class TensorBoard:
    """Scalars, histograms, texts, the settings (HParams page) and, where matplotlib is installed, curves as a picture.
    After a resume the file is written anew from the run's own logs, so that each step is in it once."""

    def __init__(self, *, hparams: bool, figures: bool, timeout: float):
        self.hparams, self.figures, self.timeout = hparams, figures, timeout

    @staticmethod
    def check() -> None:
        import importlib.util

        if importlib.util.find_spec("tensorboard") is None:
            raise ValueError(
                "tensorboard is not installed: pip install tensorboard, or leave it out with tracker=jsonl"
            )

    def open(self, folder: Path, config: dict, start_step: int) -> int:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.folder, home = folder, folder / "logs" / "tensorboard"
        for old in home.glob("events.out.tfevents.*"):
            old.unlink()
        self.writer = EventFileWriter(str(home))
        # Lets a TensorBoard that is looking on forget what it has read of the file that is gone.
        self.writer.add_event(Event(wall_time=time.time(), session_log=SessionLog(status=SessionLog.START)))
        if self.hparams:
            self._settings(config)
        return 0

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._add(step, [{"tag": name, "simple_value": value} for name, value in values.items()])

    def histograms(self, step: int, bins: Bins) -> None:
        from tensorboard.compat.proto.histogram_pb2 import HistogramProto

        found = []
        for name, b in bins.items():
            n, low, width = len(b["counts"]), b["low"], (b["high"] - b["low"]) / len(b["counts"])
            middles = [low + width * (i + 0.5) for i in range(n)]
            proto = HistogramProto(
                min=low,
                max=b["high"],
                num=sum(b["counts"]),
                sum=sum(c * m for c, m in zip(b["counts"], middles)),
                sum_squares=sum(c * m * m for c, m in zip(b["counts"], middles)),
                bucket_limit=[*(low + width * i for i in range(1, n)), b["high"]],
                bucket=b["counts"],
            )
            found.append({"tag": name, "histo": proto})
        self._add(step, found)

    def text(self, step: int, name: str, text: str) -> None:
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
        from tensorboard.compat.proto.types_pb2 import DT_STRING
        from tensorboard.plugins.text.metadata import create_summary_metadata

        block = "".join(f"    {line}\n" for line in text.split("\n"))  # Markdown for: as it is
        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
        tensor = TensorProto(dtype=DT_STRING, string_val=[block.encode()], tensor_shape=shape)
        metadata = create_summary_metadata(display_name=name, description="")
        self._add(step, [{"tag": f"{name}/text_summary", "metadata": metadata, "tensor": tensor}])

    def close(self) -> None:
        if self.figures:
            self._figures()
        if self.hparams:
            self._ended()
        self.writer.close()

    def _add(self, step: int, values: list[dict[str, Any]]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(**v) for v in values])
        self.writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))
        self.writer.flush()

    def _settings(self, config: dict) -> None:
        """What the HParams page shows of the run: the flattened config, and which metrics stand beside it."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.plugins.hparams import summary_v2 as api

        settings = flat({k: v for k, v in config.items() if k not in ASIDE})
        plain = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in settings.items()}
        described = api.hparams_config_pb([api.HParam(k) for k in plain], [api.Metric(m) for m in SHOWN])
        for summary in (described, api.hparams_pb(plain, trial_id=self.folder.name)):
            self.writer.add_event(Event(wall_time=time.time(), summary=summary))

    def _ended(self) -> None:
        from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

        status = status_of(self.folder)
        code = {"completed": "STATUS_SUCCESS", "running": "STATUS_UNKNOWN"}.get(status, "STATUS_FAILURE")
        info = plugin_data_pb2.SessionEndInfo(status=api_pb2.Status.Value(code), end_time_secs=time.time())
        described = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(session_end_info=info))
        self._add(0, [{"tag": metadata.SESSION_END_INFO_TAG, "metadata": described, "tensor": metadata.NULL_TENSOR}])

    def _figures(self) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        from etude.trackers.figures import draw

        for name, (step, figure) in draw(self.folder).items():
            with io.BytesIO() as png:
                figure.savefig(png, format="png", dpi=100)
                width, height = map(int, figure.get_size_inches() * 100)
                image = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=png.getvalue())
                self._add(step, [{"tag": name, "image": image}])
