"""One engine step on the device: from the slot table through the model to sampled tokens back in the table.

Two forms. A decode step takes everything from the device and can be recorded in a CUDA graph; a packed step
(any mix of prompts, chunks and decodes) takes its composition from the host. Knows models and sampling; does
not know when graphs are recorded, nor processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..ipc.config import LogprobsMode
from ..kernels.draw_tokens import draw_tokens
from ..kernels.forbid_tokens import forbid_tokens
from ..kernels.paged_attention import AttentionMetadata
from ..kernels.paged_prefill import tile_tokens
from ..kernels.slot_table import StepInputs, append_tokens, decode_inputs, packed_inputs
from ..kernels.stay_thresholds import stay_thresholds
from .constraints import Constraints
from .device_slots import DeviceSlots, Work
from .fixed_order import FixedOrder
from .fused import Fused, Packed, fuse
from .kv_cache import POISON
from .logprobs import Entries, LogprobStage, prompt_wishes, scores_to_show
from .mask_stage import MaskStage
from .models.causal_lm import CausalLM, LayerCache
from .parallel import TensorParallel
from .rules import PromptRow
from .sampler import Requests, Sampler
from .slots import I64, Batch, SamplingColumns
from .staging import Staging, upload

RESULTS = 8
"""Steps whose tokens the results ring holds: more than are ever in flight."""


MORE_RESULTS = 256
"""So many rows more than there are slots a step may report that is padded to a graph's shape: the rows for
prompts of the largest (`packed_graphs.Shape`)."""


class PackedTensors(NamedTuple):
    """A packed step's composition: the rows, and those that sample. All int32."""

    slots: Tensor
    """[rows], continuing ones first"""
    starts: Tensor
    """[rows], position of each row's first token"""
    query_start: Tensor
    """[rows + 1], each row's first token in the step; the last is the number of tokens"""
    tiles: Tensor
    """[2 * tiles], as `Packed` has them"""
    last: Tensor
    """[sampling rows], the last token of each in the step; then where prompt logprobs are wanted"""
    sampling_slots: Tensor
    sampling_ends: Tensor
    """[sampling rows], where the sampled tokens go"""


@dataclass(slots=True)
class Logits:
    """A step whose tokens remain to be drawn."""

    logits: Tensor
    """[rows, vocab], float32 or the model's dtype; of a fused model that is split over ranks this rank's"""
    slots: Tensor
    """int32 [rows]"""
    ends: Tensor
    """int32 [rows], where the sampled tokens go"""
    prompts: Tensor | None = None
    """[positions, vocab], where prompt logprobs are wanted"""


class Shown(NamedTuple):
    """Logprobs on their way to the host."""

    sampled: Sequence[Entries]
    prompts: Sequence[Entries]


@dataclass(slots=True)
class _Scene:
    """Which rows a decode step runs and where it reports."""

    rows: Tensor
    results: Tensor
    counter: Tensor


@dataclass(slots=True)
class _SpecialRequests:
    """The slot table as the sampler's stages for special requests want to see it."""

    sampling: SamplingColumns
    num_prompt: I64
    num_tokens: I64
    constraints: Constraints
    table: DeviceSlots

    def history(self, slots: I64, length: int) -> Tensor:
        return self.table.history(slots, length)


class DeviceStep:
    """Runs steps of `slots` through `model`; the tokens appear in `results`."""

    def __init__(
        self,
        model: CausalLM,
        caches: Sequence[LayerCache],
        slots: DeviceSlots,
        num_heads: int,
        logprobs_mode: LogprobsMode = "raw_logprobs",
        tp: TensorParallel | None = None,
        batch_invariant: bool = False,
    ) -> None:
        head_bytes = model.head_dim * caches[0][0].element_size()
        self.tile_tokens = tile_tokens(num_heads, model.num_kv_heads, head_bytes)
        self.slots = slots
        self._model, self._caches = model, caches
        self._tp = tp or TensorParallel()
        device, on_gpu = slots.device, slots.device.type == "cuda"
        self._fused: Fused | FixedOrder | None = None
        if batch_invariant:
            room = len(slots.rows), slots.tokens.shape[1]
            self._fused = FixedOrder(model, caches, slots.block_tables, num_heads, *room)
        elif on_gpu:
            self._fused = fuse(model, caches, slots.block_tables, num_heads, len(slots.rows))
        if self._fused is not None:
            self.tile_tokens = self._fused.tile_tokens
        self._sampler = Sampler(device, logprobs_mode)
        self._masks = MaskStage(device)
        self._logprobs_mode: LogprobsMode = logprobs_mode
        # Written by the device, read by the host: no copy in between.
        width = len(slots.rows) + MORE_RESULTS
        self.results = torch.zeros(RESULTS, width, dtype=torch.int32, pin_memory=on_gpu)
        self._real = _Scene(slots.rows, self.results, slots.counter)
        self._rehearsed = _Scene(
            torch.full_like(slots.rows, slots.padding_slot),
            torch.zeros_like(self.results, device=device),
            torch.zeros_like(slots.counter),
        )
        self.staging = Staging(device)
        starts = torch.arange(len(slots.rows) + 1, dtype=torch.int32, device=device)
        self._each_row = starts
        self._each_tile = torch.stack((starts, torch.zeros_like(starts)), dim=1)

    @property
    def is_fused(self) -> bool:
        return self._fused is not None

    @property
    def has_all_logits(self) -> bool:
        """This rank computes the logits of all tokens: filters can stand in a CUDA graph."""
        return self._fused is None or self._fused.share is None

    # --- decode steps: nothing here depends on anything on the host but `rows` -----------------------

    def poison(self, blocks: list[int]) -> None:
        """Overwrite these blocks of the KV cache."""
        for keys, values in self._caches:
            keys[blocks] = POISON
            values[blocks] = POISON

    def decode(self, rows: int, rehearsal: bool = False, filtered: bool = False) -> None:
        """A whole step of the first `rows` slots of `slots.rows`, sampled as `draw` does.

        A rehearsal launches the same kernels for padding and leaves no trace.
        """
        self.draw(self.decode_logits(rows, rehearsal), rehearsal, filtered)

    def decode_logits(self, rows: int, rehearsal: bool = False) -> Logits:
        """The first part of `decode`: run the model."""
        table = self.slots
        slots = (self._rehearsed if rehearsal else self._real).rows[:rows]
        inputs = decode_inputs(slots, table.lengths, table.tokens, table.block_tables, table.block_size)
        if self._fused is not None:
            return Logits(self._fused.decode(inputs, slots), slots, inputs.seq_lens)
        meta = self._decode_metadata(slots, inputs)
        hidden = self._model(inputs.input_ids, inputs.positions, self._caches, meta)
        return Logits(self._model.compute_logits(hidden), slots, inputs.seq_lens)

    def draw(self, drawn: Logits, rehearsal: bool = False, filtered: bool = False) -> None:
        """Sample by temperature and, with `filtered`, top_k, top_p and min_p; append."""
        table, logits = self.slots, drawn.logits
        share = None if self._fused is None else self._fused.share
        thresholds = None
        if filtered:
            logits, share = self._of_all_tokens(logits), None
            thresholds = stay_thresholds(logits, table.temperatures, *table.filters, drawn.slots)
        tokens = draw_tokens(
            logits,
            table.temperatures,
            table.seeds,
            drawn.ends,
            drawn.slots,
            share=share,
            thresholds=thresholds,
        )
        if filtered:  # probabilities may round differently from GPU to GPU; the ranks may not part
            self._tp.broadcast(tokens)
        self._append(tokens, drawn, rehearsal)

    def draw_special(self, drawn: Logits, work: Work) -> Shown:
        """Sample with every stage that `work` needs, and append. `work` has its columns.

        Rows with constraints wait here for the tokens of the steps before, while the device runs the model.
        """
        table, count = self.slots, work.num_sampling
        prompts = [] if drawn.prompts is None else self._prompt_logprobs(drawn.prompts, work.prompts)
        if not count:
            return Shown((), prompts)
        sampled = work.slots[work.sampling]
        if not work.special:
            rows = Logits(drawn.logits[:count], drawn.slots[:count], drawn.ends[:count])
            share = None if self._fused is None else self._fused.share
            first = 0 if share is None else share.first
            self._masks.apply(rows.logits, table.constraints, sampled, self._model.vocab_size, first)
            self.draw(rows, filtered=work.filtered)
            return Shown((), prompts)
        num_tokens = table.num_tokens.copy()
        num_tokens[sampled] -= 1
        requests: Requests = _SpecialRequests(
            table.sampling, table.num_prompt, num_tokens, table.constraints, table
        )
        batch = Batch(
            slots=work.slots,
            num_scheduled=work.num_scheduled,
            starts=work.starts,
            ends=work.starts + work.num_scheduled,
            sampling=work.sampling,
            one_each=work.decode,
            changed=work.changed,
        )
        logits = self._of_all_tokens(drawn.logits[:count]).float()
        tokens, shown = self._sampler.sample(logits, requests, batch)
        # The stages' sums over a row may round differently from GPU to GPU; the ranks may not part.
        self._tp.broadcast(tokens)
        self._append(tokens, Logits(drawn.logits, drawn.slots[:count], drawn.ends[:count]))
        return Shown([entries.send_home() for entries in shown], prompts)

    def _prompt_logprobs(self, logits: Tensor, prompts: Sequence[PromptRow]) -> list[Entries]:
        slots = np.repeat([prompt.slot for prompt in prompts], [prompt.length for prompt in prompts])
        places = np.concatenate([prompt.start + 1 + np.arange(prompt.length) for prompt in prompts])
        at_slots, at_places = self.staging.send(slots, places)
        chosen = self.slots.tokens[at_slots.long(), at_places.long()].long()
        stage = LogprobStage(prompt_wishes(prompts), lambda values: upload(values, self.slots.device))
        scores = scores_to_show(self._of_all_tokens(logits).float(), self._logprobs_mode)
        return [entries.send_home() for entries in stage.gather(scores, chosen)]

    def _of_all_tokens(self, logits: Tensor) -> Tensor:
        """[rows, vocab], on all ranks."""
        return logits if self._fused is None else self._fused.gather(logits)

    def _append(self, tokens: Tensor, drawn: Logits, rehearsal: bool = False) -> None:
        table, scene = self.slots, self._rehearsed if rehearsal else self._real
        append_tokens(
            tokens, drawn.slots, drawn.ends, table.lengths, table.tokens, scene.results, scene.counter
        )

    # --- packed steps --------------------------------------------------------------------------------

    def packed_logits(self, work: Work) -> Logits | None:
        """Run the model for `work`; None when no logits are wanted."""
        order = np.concatenate((np.flatnonzero(work.continuing), np.flatnonzero(~work.continuing)))
        query_lens, starts = work.num_scheduled[order], work.starts[order]
        query_start = np.concatenate(([0], np.cumsum(query_lens)))
        last_token = np.empty(len(order), np.int64)
        last_token[order] = query_start[1:] - 1
        num_decodes = int(work.continuing.sum())
        tiled = np.arange(0 if self._fused is None else num_decodes, len(query_lens))
        tensors = PackedTensors(
            *self.staging.send(
                work.slots[order],
                starts,
                query_start,
                prompt_tiles(tiled, query_lens, starts, self.tile_tokens).reshape(-1),
                np.concatenate((last_token[work.sampling], *_prompt_places(work, last_token))),
                work.slots[work.sampling],
                (work.starts + work.num_scheduled)[work.sampling],
            )
        )
        num_tokens, longest = int(query_start[-1]), int(query_lens.max())
        if self._fused is not None:
            logits = self.run_packed(tensors, num_tokens, longest, num_decodes)
            return None if logits is None else _divide(logits, work.num_sampling)
        inputs = self._packed_inputs(tensors, num_tokens, longest)
        meta = self._packed_metadata(inputs, tensors, query_lens, starts + query_lens)
        hidden = self._model(inputs.input_ids, inputs.positions, self._caches, meta)
        if not len(tensors.last):
            return None
        chosen = self._model.compute_logits(hidden.index_select(0, tensors.last))
        return _divide(Logits(chosen, tensors.sampling_slots, tensors.sampling_ends), work.num_sampling)

    def run_packed(
        self,
        tensors: PackedTensors,
        num_tokens: int,
        longest: int,
        num_decodes: int,
    ) -> Logits | None:
        """Run the fused model; None when no row samples. Nothing here depends on what the tensors hold.

        Args:
            longest: at least the largest number of tokens of a row.
            num_decodes: so many rows come first that have one token each.
        """
        assert self._fused is not None
        inputs = self._packed_inputs(tensors, num_tokens, longest)
        step = Packed(inputs, tensors.slots, tensors.query_start, num_decodes, tensors.tiles.view(-1, 2))
        logits = self._fused.packed(step, tensors.last)
        return None if logits is None else Logits(logits, tensors.sampling_slots, tensors.sampling_ends)

    def _packed_inputs(self, tensors: PackedTensors, num_tokens: int, longest: int) -> StepInputs:
        table = self.slots
        return packed_inputs(
            tensors.slots,
            tensors.query_start,
            tensors.starts,
            table.lengths,
            table.tokens,
            table.block_tables,
            table.block_size,
            num_tokens,
            longest,
        )

    def prepare_rules(self) -> None:
        """Compile what the first step with rules would otherwise wait for."""
        device, words = self.slots.device, -(-self._model.vocab_size // 32)
        logits = torch.zeros(1, self._model.vocab_size, dtype=self._caches[0][0].dtype, device=device)
        index = torch.full((1,), -1, dtype=torch.int32, device=device)
        forbid_tokens(logits, torch.zeros(1, words, dtype=torch.int32, device=device), index)

    def _packed_metadata(
        self,
        inputs: StepInputs,
        tensors: PackedTensors,
        query_lens: I64,
        seq_lens: I64,
    ) -> AttentionMetadata:
        # The torch path wants rows of one token first, and has no use for knowing which continue.
        single = query_lens == 1
        num_decodes = len(single) if single.all() else int(single.argmin())
        meta = AttentionMetadata(
            slot_mapping=inputs.slot_mapping,
            block_tables=self.slots.block_tables,
            query_start=tensors.query_start,
            seq_lens=inputs.seq_lens,
            num_decodes=num_decodes,
            max_seq_len=int(seq_lens.max()),
            query_lens_host=query_lens.tolist(),
            seq_lens_host=seq_lens.tolist(),
            table_rows=tensors.slots,
            tiles=tensors.tiles.view(-1, 2),
        )
        return self._portable(meta, tensors.slots)

    def _decode_metadata(self, slots: Tensor, inputs: StepInputs) -> AttentionMetadata:
        rows = len(slots)
        meta = AttentionMetadata(
            slot_mapping=inputs.slot_mapping,
            block_tables=self.slots.block_tables,
            query_start=self._each_row[: rows + 1],
            seq_lens=inputs.seq_lens,
            num_decodes=rows,
            max_seq_len=0,
            table_rows=slots,
            tiles=self._each_tile[:rows],
        )
        if slots.is_cuda:
            return meta
        lens = inputs.seq_lens.tolist()
        meta = replace(meta, max_seq_len=max(lens), query_lens_host=[1] * rows, seq_lens_host=lens)
        return self._portable(meta, slots)

    def _portable(self, meta: AttentionMetadata, slots: Tensor) -> AttentionMetadata:
        """`meta` for the torch path, when that is what runs."""
        if slots.is_cuda:
            return meta
        tables = self.slots.block_tables[slots.long()]
        return replace(meta, block_tables=tables, table_rows=None, tiles=None)


def prompt_tiles(rows: I64, query_lens: I64, starts: I64, tile_tokens: int) -> I64:
    """The tiles of these rows as `Packed` has them; those that see the fewest tokens come last."""
    counts = -(-query_lens[rows] // tile_tokens)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    row, first = np.repeat(rows, counts), number * tile_tokens
    order = np.argsort(-(starts[row] + first), kind="stable")
    return np.stack((row, first), axis=1)[order]


def _prompt_places(work: Work, last_token: I64) -> list[I64]:
    """Where in the step the positions are whose next tokens' logprobs are wanted."""
    first = last_token - work.num_scheduled + 1
    return [first[prompt.row] + np.arange(prompt.length) for prompt in work.prompts]


def _divide(logits: Logits, num_sampling: int) -> Logits:
    """Logits of sampling rows, and of prompts' positions behind them."""
    if len(logits.logits) == num_sampling:
        return logits
    prompts = logits.logits[num_sampling:]
    return Logits(logits.logits[:num_sampling], logits.slots, logits.ends, prompts)
