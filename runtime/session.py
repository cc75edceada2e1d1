"""A session: open executables on a device, requests in, chunks of frames out.

One session serves one request at a time; sessions share nothing, so a worker opens its own.
"""

import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..engine.calls import Executables, dit_conditions
from ..engine.errors import Cancelled, SpecError
from ..engine.profile import Profile
from ..engine.sampler import block_noise, stage_sigmas
from ..engine.segments import plan_segments
from ..engine.stage1 import expert_of, image_condition, run_stage1
from ..engine.stage2 import run_segment, start_state
from ..engine.state import Conditions, SegmentState
from .backend_eager import open_eager
from .bundle import load_bundle, open_graphs
from .conditioning import PromptEncoder
from .cuda_graphs import capture_steps
from .frame_copy import Copying, FrameCopier
from .image import to_tensor
from .models import Loaded
from .timing import Timings

Phase = Literal["prompt", "stage1", "stage2"]


@dataclass(frozen=True)
class Request:
    """What is asked: the image already fitted, uint8 [H, W, 3] of the profile's size, and the prompt."""

    image: np.ndarray
    prompt: str = ""
    negative: str | None = None  # None = the profile's own
    seed: int = 0
    deep: bool = False  # ask for FrameChunk.deep, which files deeper than 8 bits are made from


@dataclass(frozen=True)
class FrameChunk:
    """Finished frames: uint8 [n, H, W, 3], the first one's index in the clip, and their segment.

    `deep` holds the same frames before they were rounded: float32 [n, H, W, 3] in [0, 1], display-referred sRGB.
    """

    frames: np.ndarray
    index: int
    segment: int
    deep: np.ndarray | None = None


@dataclass(frozen=True)
class Progress:
    """Where a run is: `done` of `total` parts of a phase, and what was done last; in Stage II, also which segment."""

    phase: Phase
    done: int
    total: int
    what: str
    segment: int = 0
    segments: int = 0


OnProgress = Callable[[Progress], bool | None]
OnState = Callable[[SegmentState], None]


@dataclass(frozen=True)
class Clip:
    """What is constant while the segments of one clip are made."""

    seed: int
    motion: Tensor  # fp32 [1, z, F, h, w]
    conditions: Conditions
    sigmas: tuple[float, ...]


class Session:
    """Open executables and the prompt encoder of one profile. A context manager; not thread-safe."""

    def __init__(
        self,
        profile: Profile,
        graphs: Executables,
        encoder: PromptEncoder,
        device: torch.device | str = "cpu",
        image_encoder: Callable[[np.ndarray], Tensor] | None = None,
        copier: FrameCopier | None = None,
    ) -> None:
        """`image_encoder` gives CLIP tokens [1, n, image_dim] of a frame, for a Stage I that reads them."""
        if profile.stage1.dit.image_dim and image_encoder is None:
            raise SpecError(
                "Stage I: got no image encoder, want one, as this DiT reads CLIP image tokens; pass --image-encoder"
            )
        self.profile = profile
        self.graphs = graphs
        self.device = torch.device(device)
        self.timings = Timings(self.device)
        self._encoder = encoder
        self._image_encoder = image_encoder
        self._copier = copier or FrameCopier(self.device)

    @classmethod
    def open(cls, source: Loaded | Path | str) -> "Session":
        """A session on what `load_models`, `load_bundle` or `accelerate` gives, or on the bundle in a folder."""
        loaded = source if isinstance(source, Loaded) else load_bundle(source)
        if loaded.bundle is None:
            graphs = open_eager(loaded.profile, loaded.modules, loaded.dtype)
        else:
            graphs = open_graphs(loaded)
        if loaded.acceleration.cuda_graphs:
            graphs = capture_steps(graphs, loaded.device)
        copier = FrameCopier(loaded.device, loaded.acceleration.kernels.to_bytes)
        return cls(loaded.profile, graphs, loaded.prompts, loaded.device, loaded.image_encoder, copier)

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free every executable."""
        for graph in self.graphs.values():
            graph.close()

    def generate(
        self, request: Request, on_progress: OnProgress | None = None, ahead: bool = False
    ) -> Generator[FrameChunk, None, None]:
        """Chunks of frames in order, each as soon as its segment is decoded.

        `on_progress` is called after every step and stops the run by returning False (Cancelled is raised).
        `ahead`: the next segment is made by a thread while the caller works with a chunk, and while the chunk's frames
        leave the device; on_progress is called from there, and the iterator's `close()` ends it after its present step.
        Frame 0 is the request's image itself.
        """
        clip, state = self.prepare(request, on_progress)
        if not ahead:
            yield from self.resume(request, clip, state, on_progress)
            return
        left = threading.Event()

        def note(progress: Progress) -> bool:
            wanted = on_progress is None or on_progress(progress) is not False
            return wanted and not left.is_set()

        segments = self._segments(request, clip, state, note)
        with ThreadPoolExecutor(1, "swifti2v ahead") as thread:
            try:
                coming = thread.submit(next, segments, None)
                while (made := coming.result()) is not None:
                    coming, copying = thread.submit(next, segments, None), made[0]
                    del made
                    yield self._chunk(request, copying)
            finally:
                left.set()  # so that a caller who leaves early waits for one step and not for a segment

    def prepare(
        self, request: Request, on_progress: OnProgress | None = None, motion: Tensor | None = None
    ) -> tuple[Clip, SegmentState]:
        """Everything before the first segment: prompt, Stage I, and the state that the first segment starts from.

        `motion` latents [1, C1, F, h, w], if given, take the place of what Stage I would make.
        """
        check_request(request, self.profile)
        pixels = to_tensor(request.image).to(self.device)
        with self.timings.phase("prompt"):
            text, negative = self._encode(request)
            _Counter(on_progress, "prompt", 1)("encoded")
        profile = self.profile
        if motion is None:
            motion = self._run_stage1(request, pixels, text, negative, on_progress)
        else:
            motion = check_motion(motion, profile).to(self.device)
        sigmas = stage_sigmas(profile.stage2, profile.stage2_start)
        with self.timings.phase("prompt"):
            conditions = dit_conditions(self.graphs, "stage2", sigmas, text, negative, guidance=profile.stage2.guidance)
        with self.timings.phase("reference"):
            state = start_state(self.graphs, pixels, motion)
        return Clip(request.seed, motion, conditions, sigmas), state

    def resume(
        self,
        request: Request,
        clip: Clip,
        state: SegmentState,
        on_progress: OnProgress | None = None,
        on_state: OnState | None = None,
    ) -> Iterator[FrameChunk]:
        """Chunks from `state` on; the state is donated, so pass a clone to use it again. Equal states, equal frames.

        `on_state` sees the state after every segment, before the segment's chunk is handed out. The next segment takes
        it: save or clone it before the next chunk is asked for.
        """
        for copying, after in self._segments(request, clip, state, on_progress):
            chunk = self._chunk(request, copying)
            if on_state is not None:
                on_state(after)
            del after  # nothing here holds the caches while the next segment is made
            yield chunk

    def _segments(
        self, request: Request, clip: Clip, state: SegmentState, on_progress: OnProgress | None
    ) -> Iterator[tuple[Copying, SegmentState]]:
        """The frames of one segment after another on their way to the host, and the state after it."""
        profile = self.profile
        segments = plan_segments(profile.blocks, profile.noisy, profile.neighbours)
        for segment in segments[state.segment :]:
            report = _Counter(on_progress, "stage2", len(clip.sigmas) + 2, segment.index, len(segments))

            @contextmanager
            def phase(name: str, report: "_Counter" = report) -> Iterator[None]:
                with self.timings.phase(name):
                    yield
                if name != "denoise":  # its steps have been reported one by one
                    report(f"{name} ready" if name == "reference" else "decoded")

            pixels, state = run_segment(
                self.graphs, profile, segment, state, clip.conditions, clip.motion, clip.seed, clip.sigmas,
                report.step, phase,
            )  # fmt: skip
            with self.timings.phase("frames"):
                copying = self._copier.start(pixels, state.latents, segment.index, request.deep)
            yield copying, state

    def _chunk(self, request: Request, copying: Copying) -> FrameChunk:
        """The frames of a segment, once they are on the host; the clip's first one is the request's image."""
        frames, deep = copying.wait()
        if copying.segment == 0:
            frames[0] = request.image
            if deep is not None:
                deep[0] = np.float32(request.image) / 255
        profile = self.profile
        segment = plan_segments(profile.blocks, profile.noisy, profile.neighbours)[copying.segment]
        index = 0 if segment.index == 0 else (segment.noisy[0] - 1) * profile.block_frames + 1
        return FrameChunk(frames, index, segment.index, deep)

    def _encode(self, request: Request) -> tuple[Tensor, Tensor | None]:
        """Embeddings of the prompt and, where a stage is guided, of the negative prompt, in the graphs' dtype."""
        profile = self.profile
        dtype = self.graphs["stage2_text"].spec.inputs[0].dtype
        prompts = [request.prompt]
        if profile.guided:
            prompts.append(profile.text.negative if request.negative is None else request.negative)
        text, *negative = (rows.to(self.device, dtype) for rows in self._encoder.encode_all(prompts))
        return text, negative[0] if negative else None

    def _run_stage1(
        self, request: Request, pixels: Tensor, text: Tensor, negative: Tensor | None, on_progress: OnProgress | None
    ) -> Tensor:
        profile, stage = self.profile, self.profile.stage1
        sigmas = stage_sigmas(stage)
        report = _Counter(on_progress, "stage1", len(sigmas) + 1)
        with self.timings.phase("stage1"):
            image_tokens = None
            if self._image_encoder is not None and stage.dit.image_dim:
                image_tokens = self._image_encoder(request.image).to(self.device, text.dtype)
            by_expert = {
                expert: dit_conditions(self.graphs, expert, sigmas, text, negative, image_tokens, stage.guidance)
                for expert in {expert_of(profile, sigma) for sigma in sigmas}
            }
            conditions = [by_expert[expert_of(profile, sigma)] for sigma in sigmas]
            condition = image_condition(self.graphs, profile, shrink(pixels, stage.height, stage.width))
            report("image encoded")
            shape = (stage.dit.out_channels, stage.latent_height, stage.latent_width)
            noise = block_noise(request.seed, 1, range(profile.blocks), shape).to(self.device)
            return run_stage1(self.graphs, profile, condition, conditions, noise, sigmas, report.step)


def shrink(pixels: Tensor, height: int, width: int) -> Tensor:
    """The image for Stage I: [1, 3, 1, H, W] -> [1, 3, 1, height, width], bicubic with antialiasing."""
    frame = torch.nn.functional.interpolate(
        pixels[:, :, 0], size=(height, width), mode="bicubic", antialias=True, align_corners=False
    )
    return frame.clamp(-1, 1).unsqueeze(2)


def check_request(request: Request, profile: Profile) -> None:
    """Refuse an image that is not the profile's size, a seed out of range, and prompts that are no Unicode text."""
    image, want = request.image, (profile.height, profile.width, 3)
    if not isinstance(image, np.ndarray) or image.shape != want or image.dtype != np.uint8:
        got = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise SpecError(f"image: got {got}, want uint8 {want}; fit it with fit_image first")
    if not isinstance(request.seed, (int, np.integer)) or not 0 <= request.seed < 2**63:
        raise SpecError(f"seed: got {request.seed!r:.40}, want a whole number from 0 to 2^63-1; choose another")
    for name, text in (("prompt", request.prompt), ("negative", request.negative or "")):
        if not isinstance(text, str) or any("\ud800" <= letter <= "\udfff" for letter in text):
            raise SpecError(f"{name}: got {text!r:.40}, want text of valid Unicode; correct it")


def check_motion(motion: Tensor, profile: Profile) -> Tensor:
    """The motion latents in fp32; refuses those that are not the profile's size."""
    stage = profile.stage1
    want = (1, stage.dit.out_channels, profile.blocks, stage.latent_height, stage.latent_width)
    if tuple(motion.shape) != want:
        raise SpecError(f"motion latents: got {tuple(motion.shape)}, want {want}; make them for this profile")
    return motion.float()


class _Counter:
    """Reports the parts of one phase as they are done."""

    def __init__(
        self, on_progress: OnProgress | None, phase: Phase, total: int, segment: int = 0, segments: int = 0
    ) -> None:
        self._on_progress = on_progress
        self._place = Progress(phase, 0, total, "", segment, segments)

    def __call__(self, what: str) -> None:
        """One part more is done. Raises Cancelled if the callback returns False."""
        self._place = replace(self._place, done=self._place.done + 1, what=what)
        if self._on_progress is not None and self._on_progress(self._place) is False:
            raise Cancelled(f"{self._place.phase}: stopped on request after {what}")

    def step(self, step: int) -> None:
        self(f"step {step + 1}")
