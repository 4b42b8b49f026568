"""The service's settings: one pydantic model; :mod:`prenet4d_server.config_file` reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    SecretStr,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from prenet4d_client.addresses import address_fault
from prenet4d_engines.config import CorrectorConfig, Count, Positive
from prenet4d_server.sockets import is_curve_key, is_local

ENVIRONMENT_PREFIX = "PRENET4D_"

FILE = "_file"
"""Carries the TOML file to ``Settings``, where it ranks below the environment."""

MAX_FRAMES = 1 << 28
"""Frames that one acquisition may have: each must be told apart from those that came before."""

LEAST_TOKEN = 8
"""Characters of the operator's token; shorter ones are guessed."""


def scan_fault(rows: int, columns: int) -> str:
    """Why a scan of so many probe positions cannot be, without a full stop; empty: it can."""
    frames = rows * columns
    if frames <= MAX_FRAMES:
        return ""
    return (
        f"a scan of {rows} × {columns} has {frames:,} frames, and at most {MAX_FRAMES:,} can be "
        "numbered"
    )


_Threshold = Annotated[float, Field(ge=0)]


def _well_formed(address: str) -> str:
    if fault := address_fault(address):
        raise ValueError(fault.removesuffix("."))  # which setting it is will stand before it
    return address


_Address = Annotated[str, AfterValidator(_well_formed)]


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class SourceSettings(_Section):
    """Where frames come from."""

    DEFAULT_ADDRESSES: ClassVar[dict[str, str]] = {
        "native": "tcp://127.0.0.1:5560",
        "dectris1": "tcp://127.0.0.1:9999",
        "dectris2": "tcp://127.0.0.1:31001",
        "replay": "",
    }

    kind: Literal["native", "dectris1", "dectris2", "replay"] = "native"
    """native: frames from FrameSender. dectris1, dectris2: a DECTRIS detector's Stream V1 or V2.
    replay: a file."""
    address: _Address | None = None
    """native: where to listen. dectris1, dectris2: the detector to connect to. Default: port 5560,
    9999 or 31001 of this machine."""
    channel: str | int | None = None
    """dectris2: which threshold channel to correct, by name or number; the first by default."""
    scan_shape: tuple[Count, Count] | None = None
    """[rows, columns] of the scan, for detectors that do not know it."""
    gain: Annotated[float, Field(ge=1e-6, le=1e6)] = 1.0
    """Detector counts per electron; dectris1, dectris2, replay. (FrameSender tells its own.)"""
    max_message: ByteSize = Field(default=ByteSize(256 << 20), ge=1 << 16, le=1 << 36)
    """Larger messages are refused."""
    path: Path | None = None
    """replay: the file to stream."""
    dataset: str | None = None
    """replay: which dataset of an HDF5 file or member of an .npz; the only fitting one by
    default."""
    rate: Annotated[float, Field(ge=1e-3, le=1e6)] | None = None
    """replay: frames per second; as fast as it goes by default."""
    repeat: Count = 1
    """replay: how many times the file is streamed."""

    @field_validator("scan_shape")
    @classmethod
    def _can_be_numbered(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and (fault := scan_fault(*value)):
            raise ValueError(fault)
        return value

    @model_validator(mode="after")
    def _replay_has_a_file(self) -> SourceSettings:
        if self.kind == "replay" and self.path is None:
            raise ValueError("A replay needs a file: name it with --data, or set source.path.")
        return self

    @model_validator(mode="after")
    def _a_sender_tells_its_gain(self) -> SourceSettings:
        if self.kind == "native" and self.gain != 1:
            raise ValueError(
                f"source.gain = {self.gain:g} would do nothing: FrameSender tells the gain of its "
                "frames itself. Leave source.gain out, and give it to FrameSender.start."
            )
        return self

    @property
    def endpoint(self) -> str:
        """The address in use: the one that was set, or the kind's default."""
        return self.DEFAULT_ADDRESSES[self.kind] if self.address is None else self.address


class RingSettings(_Section):
    """Where frames wait between the detector and the corrector."""

    size: ByteSize = Field(default=ByteSize(512 << 20), ge=1 << 20)
    """Memory for waiting frames. The more, the longer a pause of the corrector that the detector
    does not notice."""
    policy: Literal["block", "shed"] = "block"
    """When the ring is full. block: hold the detector back, lose nothing. shed: drop whole frames,
    count them and say so."""
    decode_threads: Annotated[int, Field(ge=1, le=64)] = 2
    """Threads that decompress frames into the ring."""
    restart_ingest: bool = True
    """Start the ingest process again when it died."""


class BatchSettings(_Section):
    """How frames are gathered for the corrector."""

    size: Annotated[int, Field(ge=1, le=4096)] = 32
    """Frames in a full batch. Larger batches are more efficient; 16 to 64 suits CPUs."""
    max_delay_ms: Annotated[float, Field(ge=0)] = 50.0
    """A batch that is not full is corrected once its oldest frame has waited this long."""


class CorrectorSettings(CorrectorConfig):
    """How patterns are corrected."""

    backend: Literal["auto", "tensorrt", "torch", "identity"] = "auto"  # type: ignore[assignment]  # one more
    """auto: the fastest that works here. identity: correct nothing, to measure all but the
    correction."""


class StreamSettings(_Section):
    """The PUB socket: telemetry, patterns and events for those who may miss some."""

    address: _Address = "tcp://127.0.0.1:5561"
    """Where to listen; port * takes any free one."""
    high_water: Count = 16
    """Messages that wait for a subscriber that is slow; it misses what comes beyond them. One
    message holds a whole batch."""
    mean_every_s: Positive = 1.0
    """The running mean pattern is published no more often than this."""
    maps_every_s: Positive = 0.5
    """What has changed in the scan maps is published no more often than this."""
    preview_every_s: Positive = 0.4
    """A frame and what became of it are published for people to look at no more often than this."""
    preview_pixels: Annotated[int, Field(ge=16)] = 256
    """Larger frames are binned to at most so many pixels a side for that."""


class LosslessSettings(_Section):
    """The path for receivers that must not miss a batch, such as the recorder."""

    address: _Address = "tcp://127.0.0.1:5562"
    """Where to listen; port * takes any free one."""
    heartbeat_s: Positive = 5.0
    """A receiver that is silent for longer is dropped."""
    on_lag: Literal["hold", "drop"] = "hold"
    """When a receiver does not keep up. hold: hold the pipeline back, up to max_lag_s. drop: drop
    the receiver at once."""
    max_lag_s: Positive = 30.0
    """With hold: a receiver that takes nothing for longer is dropped, so that the scan goes on."""


class ControlSettings(_Section):
    """The socket that answers commands."""

    address: _Address = "tcp://127.0.0.1:5563"
    """Where to listen; port * takes any free one."""


class HttpSettings(_Section):
    """The operator's page, metrics for Prometheus and health checks."""

    enabled: bool = True
    """Whether to serve them, in a process of their own."""
    address: _Address = "tcp://127.0.0.1:5564"
    """Where to listen for HTTP; port * takes any free one."""
    operator_token: Annotated[SecretStr, Field(min_length=LEAST_TOKEN)] | None = None
    """Who opens the page with it may command; others may only look. By default one is made at every
    start, and the log tells the page's address with it."""
    operator_token_file: Path | None = None
    """The file that holds the token, and nothing else, to keep it over restarts and out of this
    configuration. Where there is no such file, it is made, with a new token."""
    updates_per_second: Annotated[float, Field(ge=0.01, le=20)] = 2.0
    """How often a page in a browser is brought up to date."""
    gives_way: bool = True
    """Run the page only while nobody else wants the processor, so that it costs the correction
    nothing. false: it takes its turn like every program, for a machine that others keep busy."""

    @field_validator("address")
    @classmethod
    def _for_browsers(cls, address: str) -> str:
        if not address.startswith("tcp://"):
            raise ValueError(f"{address!r} is not for HTTP: write for example tcp://127.0.0.1:5564")
        return address

    @model_validator(mode="after")
    def _one_token(self) -> HttpSettings:
        if self.operator_token is not None and self.operator_token_file is not None:
            raise ValueError("Set operator_token or operator_token_file, not both.")
        return self


class SecuritySettings(_Section):
    """Who may reach the service from other machines, and who may command it."""

    secret_key_file: Path | None = None
    """The service's CURVE secret key (``prenet4d keygen`` makes one). With it, every ZeroMQ socket
    is encrypted, and only who has the service's public key gets in."""
    insecure: bool = False
    """Listen beyond this machine without encryption: anyone who reaches the port may read and
    command."""
    operator_keys: tuple[str, ...] = ()
    """Public CURVE keys (``prenet4d keygen`` makes pairs) of the clients that may command over the
    control socket; others may only ask. Empty: whoever gets in may command."""


class RecordingSettings(_Section):
    """Recordings that the operator starts and stops from the page or by a command."""

    directory: Path | None = None
    """Takes all of them; unset: nobody can start one. No name that a client chooses leads out of
    it."""
    format: Literal["h5", "zarr"] = "h5"
    """h5: HDF5 with NeXus, HyperSpy and EMD attributes. zarr: a Zarr v3 store (the extra zarr)."""
    content: Literal["corrected", "aligned", "both"] = "corrected"
    """Denoised patterns, raw counts recentered and undistorted, or both."""
    compression: Literal["none", "bslz4", "gzip"] = "bslz4"
    """bslz4 needs hdf5plugin where HDF5 is read; gzip is slow; none is fastest."""
    keep_free: ByteSize = Field(default=ByteSize(1 << 30), ge=64 << 20)
    """A recording does not start, or is closed, when the disk has less than this left."""


class AlarmSettings(_Section):
    """What is told as an alarm, once when it begins and once when it is over; 0 turns one off.

    An alarm is over when what it watches has fallen well below its threshold.
    """

    center_moved_px: _Threshold = 5.0
    """The tracked beam center has moved by more pixels than this within center_moved_s. It is
    compared with the same columns of the scan's lines before: neither the descan along a line nor
    the fly-back counts."""
    center_moved_s: Positive = 2.0
    """See center_moved_px."""
    ellipticity_s: _Threshold = 60.0
    """The calibration is not locked, so many seconds after the acquisition began or it was lost."""
    receiver_behind_s: _Threshold = 1.0
    """A lossless receiver has not been given a message that is so many seconds old: it holds the
    service back."""
    detector_silent_s: _Threshold = 5.0
    """No frame has come for so long in the middle of an acquisition."""
    flagged_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """This share of the latest frames (those of 5 s, at least 64) has a flag: blank, saturated, low
    dose, center off the track, or no beam."""
    rejected_share: Annotated[float, Field(ge=0, le=1)] = 0.02
    """This share of the latest frames (those of 5 s, at least 64) was rejected or shed."""
    backlog_share: Annotated[float, Field(ge=0, le=1)] = 0.8
    """The ring where frames wait is filled to this share."""


class LogSettings(_Section):
    """What is written to standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """The least important messages to write."""
    format: Literal["text", "json"] = "text"
    """json: one object a line, with the acquisition's id; deploy/README.md lists its fields."""


class Settings(BaseSettings):
    """Everything that can be set, section by section.

    Made by :func:`load_settings`, or directly from keyword arguments (which win over the
    environment).
    """

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        env_prefix=ENVIRONMENT_PREFIX,
        env_nested_delimiter="__",
        nested_model_default_partial_update=True,
        use_attribute_docstrings=True,
    )

    source: SourceSettings = SourceSettings()
    ring: RingSettings = RingSettings()
    batch: BatchSettings = BatchSettings()
    corrector: CorrectorSettings = CorrectorSettings()
    stream: StreamSettings = StreamSettings()
    lossless: LosslessSettings = LosslessSettings()
    control: ControlSettings = ControlSettings()
    http: HttpSettings = HttpSettings()
    security: SecuritySettings = SecuritySettings()
    recording: RecordingSettings = RecordingSettings()
    alarms: AlarmSettings = AlarmSettings()
    log: LogSettings = LogSettings()
    drain_s: Annotated[float, Field(ge=0)] = 10.0
    """On Ctrl-C or SIGTERM, frames already received are still corrected for at most so long."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - no .env file is read
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - nor secrets' folder
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then the environment, then the TOML file that :func:`load_settings` was given."""
        file = getattr(init_settings, "init_kwargs", {}).pop(FILE, {})
        return init_settings, env_settings, InitSettingsSource(settings_cls, file)

    @model_validator(mode="after")
    def _addresses_fit(self) -> Settings:
        zmq_addresses = {
            "stream.address": self.stream.address,
            "lossless.address": self.lossless.address,
            "control.address": self.control.address,
        }
        if self.source.kind == "native":
            zmq_addresses["source.address"] = self.source.endpoint
        listening = dict(zmq_addresses)
        if self.http.enabled:
            listening["http.address"] = self.http.address
        first: dict[str, str] = {}
        for name, where in listening.items():
            if first.setdefault(where, name) != name and not where.endswith("*"):
                raise ValueError(
                    f"{first[where]} and {name} are both {where!r}: give each its own."
                )
        exposed = {name: where for name, where in zmq_addresses.items() if not is_local(where)}
        if self.security.secret_key_file is None and exposed and not self.security.insecure:
            name, where = next(iter(exposed.items()))
            raise ValueError(
                f"{name} = {where!r} can be reached from other machines. Protect it with keys "
                "(prenet4d keygen; security.secret_key_file), or set security.insecure = true."
            )
        if self.http.enabled and not (is_local(self.http.address) or self.security.insecure):
            raise ValueError(
                f"http.address = {self.http.address!r} can be reached from other machines, and "
                "HTTP is not encrypted. Listen on 127.0.0.1, or set security.insecure = true."
            )
        return self

    @model_validator(mode="after")
    def _operators_can_be_told(self) -> Settings:
        if self.security.operator_keys and self.security.secret_key_file is None:
            raise ValueError(
                "security.operator_keys tells clients apart by their CURVE keys: it needs "
                "security.secret_key_file too (prenet4d keygen makes one)."
            )
        for key in self.security.operator_keys:
            if not is_curve_key(key):
                raise ValueError(
                    f"security.operator_keys: {key!r} is no public CURVE key of 40 characters."
                )
        return self
