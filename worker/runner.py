"""The model runner on CPUs: one rank's model and KV cache, and the way from a batch to its tokens.

Knows models and the other ranks; does not know the pipe. Its work per step around the model is a fixed number
of array operations, whatever the number of rows. GPUs have `cuda_runner`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..ipc.config import EngineConfig
from ..ipc.messages import Admit, Argument, PromptLogprobs, Sampling, StepPlan, pack
from ..kernels.paged_attention import AttentionMetadata
from .control_group import usable_cores
from .host_memory import keep_freed_memory, return_freed_memory
from .in_order import Executed
from .invariance import find_query_multiple, find_row_multiple
from .kv_cache import POISON, CacheSize, cpu_budget, size_cache
from .layers import RowWise
from .logprobs import LogprobStage, prompt_to_wire, prompt_wishes, scores_to_show, to_wire
from .models import build_model
from .models.causal_lm import CausalLM, LayerCache
from .parallel import TensorParallel, connect, nothing
from .sampler import Sampler
from .slots import I32, I64, Batch, Slots
from .weights import load_weights, weights_bytes, weights_checksum

_WARM_UP_ROWS = 8
_WARM_UP_TOKENS = 32


@dataclass(slots=True)
class ModelInput:
    """A batch as the model takes it: rows of one token first."""

    input_ids: Tensor
    """int64 [tokens]"""
    positions: Tensor
    """int64 [tokens]"""
    metadata: AttentionMetadata
    last_tokens: Tensor | None
    """int64 [sampling rows]: their last tokens' places; None: every token is one, in order."""
    places: I64
    """Each row's last token's place."""


class ModelRunner:
    """A worker's backend with a network."""

    def __init__(
        self, config: EngineConfig, rank: int, rendezvous: str, advance: Callable[[], None] = nothing
    ) -> None:
        """`advance`: see `TensorParallel`."""
        self._config = config
        self._advance = advance
        self._rank = rank
        self._rendezvous = rendezvous
        self._device = torch.device("cpu")
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self._sampler = Sampler(self._device, config.logprobs_mode)
        self._kv_caches: list[LayerCache] = []
        self._tp = TensorParallel()
        self._row_wise = RowWise()
        self._query_multiple = 0
        self._model: CausalLM

    @torch.inference_mode()
    def load(self, progress: Callable[[str], None]) -> CacheSize:
        """Bring the weights onto the device. Raises ConfigError for files that are not as they must be."""
        config = self._config
        torch.set_num_threads(max(1, usable_cores() // config.tensor_parallel_size))  # the ranks share them
        keep_freed_memory()
        if config.tensor_parallel_size > 1:
            progress("connect ranks")
            size = config.tensor_parallel_size
            self._tp = connect(self._rank, size, self._device, self._rendezvous, self._advance)
        progress("load weights")
        self._model = self._load_model()
        if config.batch_invariant:
            progress("look for batch-invariant kernels")
            model = self._model
            self._row_wise.multiple = find_row_multiple(model)
            self._row_wise.whole_rows = True
            heads = int(config.hf_config["num_attention_heads"])
            self._query_multiple = find_query_multiple(heads, model.num_kv_heads, model.head_dim, self._dtype)
        progress("size KV cache")
        return size_cache(config, self._block_bytes(), cpu_budget(config))

    @torch.inference_mode()
    def allocate(self, num_blocks: int, max_model_len: int) -> None:
        self._kv_caches = self._new_caches(num_blocks)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run prefill, decode and sampling once; what they leave in the cache is nobody's."""
        rows = min(_WARM_UP_ROWS, self._config.max_num_seqs)
        length = min(
            _WARM_UP_TOKENS, self._config.max_model_len - 1, self._config.max_num_batched_tokens // rows
        )
        self._rehearse(rows, max(length, 1), len(self._kv_caches[0][0]))

    def release(self, keep_weights: bool) -> None:
        """The weights are in host memory already: these are kept or dropped where they are."""
        self._kv_caches = []
        if not keep_weights:
            del self._model
        return_freed_memory()

    @torch.inference_mode()
    def restore_weights(self) -> None:
        if not hasattr(self, "_model"):
            self._model = self._load_model()

    @torch.inference_mode()
    def poison(self, blocks: list[int]) -> None:
        for keys, values in self._kv_caches:
            keys[blocks] = POISON
            values[blocks] = POISON

    def memory(self) -> dict[str, Argument]:
        return {
            "weights_bytes": weights_bytes(self._model) if hasattr(self, "_model") else 0,
            "kv_cache_bytes": sum(keys.nbytes + values.nbytes for keys, values in self._kv_caches),
        }

    def weights_checksum(self) -> str:
        return weights_checksum(self._model)

    @torch.inference_mode()
    def execute(self, slots: Slots, batch: Batch) -> Executed:
        """The tokens of the batch's sampling rows. All ranks return the same: they see the same logits."""
        if not len(batch.slots):
            return Executed(np.zeros(0, np.int32))
        inputs = self.prepare(slots, batch)
        hidden = self._model(inputs.input_ids, inputs.positions, self._kv_caches, inputs.metadata)
        prompts = self._prompt_logprobs(hidden, inputs.places, slots, batch) if batch.prompts else []
        if not len(batch.sampling):
            return Executed(np.zeros(0, np.int32), None, prompts)
        if inputs.last_tokens is not None:
            hidden = hidden[inputs.last_tokens]
        logits = self._model.compute_logits(hidden)
        tokens, logprobs = self._sampler.sample(logits, slots, batch)
        return Executed(tokens.numpy().astype(np.int32), to_wire(logprobs), prompts)

    def _prompt_logprobs(
        self, hidden: Tensor, places: I64, slots: Slots, batch: Batch
    ) -> list[PromptLogprobs]:
        """What the prompts' next tokens are, and how likely they were."""
        index: list[I64] = []
        following: list[I32] = []
        for row, slot, start, length, _ in batch.prompts:
            first = int(places[row] - batch.num_scheduled[row] + 1)
            index.append(np.arange(first, first + length))
            following.append(slots.tokens[slot, start + 1 : start + length + 1])
        logits = self._model.compute_logits(hidden[torch.from_numpy(np.concatenate(index))])
        stage = LogprobStage(prompt_wishes(batch.prompts), torch.from_numpy)
        chosen = torch.from_numpy(np.concatenate(following).astype(np.int64))
        scores = scores_to_show(logits, self._config.logprobs_mode)
        return prompt_to_wire(batch.prompts, stage.gather(scores, chosen))

    def prepare(self, slots: Slots, batch: Batch) -> ModelInput:
        """Lay out the batch for the model."""
        if batch.one_each:
            return self._decode_input(slots, batch)
        return self._mixed_input(slots, batch)

    def _decode_input(self, slots: Slots, batch: Batch) -> ModelInput:
        rows, positions, size = batch.slots, batch.starts, self._config.block_size
        blocks = slots.block_tables[rows, positions // size].astype(np.int64)
        metadata = self._metadata(
            slots,
            rows,
            batch.ends,
            slot_mapping=blocks * size + positions % size,
            query_lens=batch.num_scheduled,
            num_decodes=len(rows),
        )
        everyone = len(batch.sampling) == len(rows)
        return ModelInput(
            torch.from_numpy(slots.tokens[rows, positions].astype(np.int64)),
            torch.from_numpy(positions),
            metadata,
            None if everyone else torch.from_numpy(batch.sampling),
            np.arange(len(rows)),
        )

    def _mixed_input(self, slots: Slots, batch: Batch) -> ModelInput:
        size = self._config.block_size
        single = batch.num_scheduled == 1
        order = np.concatenate((np.flatnonzero(single), np.flatnonzero(~single)))
        rows, query_lens = batch.slots[order], batch.num_scheduled[order]
        query_ends = np.cumsum(query_lens)
        # Token t of the step is token t - (its row's first) of its row.
        shift = batch.starts[order] - (query_ends - query_lens)
        positions = np.arange(query_ends[-1]) + np.repeat(shift, query_lens)
        slot_of_token = np.repeat(rows, query_lens)
        blocks = slots.block_tables[slot_of_token, positions // size].astype(np.int64)
        metadata = self._metadata(
            slots,
            rows,
            batch.ends[order],
            slot_mapping=blocks * size + positions % size,
            query_lens=query_lens,
            num_decodes=int(single.sum()),
        )
        last_token = np.empty(len(rows), np.int64)  # of each row of the plan
        last_token[order] = query_ends - 1
        return ModelInput(
            torch.from_numpy(slots.tokens[slot_of_token, positions].astype(np.int64)),
            torch.from_numpy(positions),
            metadata,
            torch.from_numpy(last_token[batch.sampling]),
            last_token,
        )

    def _metadata(
        self, slots: Slots, rows: I64, seq_lens: I64, *, slot_mapping: I64, query_lens: I64, num_decodes: int
    ) -> AttentionMetadata:
        max_seq_len = int(seq_lens.max())
        max_blocks = -(-max_seq_len // self._config.block_size)
        query_start = np.zeros(len(rows) + 1, np.int32)
        np.cumsum(query_lens, out=query_start[1:])
        return AttentionMetadata(
            slot_mapping=torch.from_numpy(slot_mapping),
            block_tables=torch.from_numpy(slots.block_tables[:, :max_blocks][rows]),
            query_start=torch.from_numpy(query_start),
            seq_lens=torch.from_numpy(seq_lens.astype(np.int32)),
            num_decodes=num_decodes,
            max_seq_len=max_seq_len,
            query_lens_host=query_lens.tolist(),
            seq_lens_host=seq_lens.tolist(),
            invariant=self._query_multiple,
        )

    def _load_model(self) -> CausalLM:
        config = self._config
        model = build_model(
            config.architecture,
            config.hf_config,
            self._dtype,
            self._device,
            self._tp,
            config.max_model_len,
            self._row_wise,
        )
        load_weights(model, config, self._device, self._tp)
        return model.eval()

    def _block_bytes(self) -> int:
        model = self._model
        per_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * self._dtype.itemsize
        return self._config.block_size * per_token

    def _new_caches(self, num_blocks: int) -> list[LayerCache]:
        model = self._model
        shape = (num_blocks, self._config.block_size, model.num_kv_heads, model.head_dim)
        return [(self._zeros(shape), self._zeros(shape)) for _ in range(model.num_layers)]

    def _zeros(self, shape: tuple[int, ...]) -> Tensor:
        # numpy leaves the zeroing to the kernel: memory counts when a block is first written. torch.zeros
        # writes it all (3 s for 2 GiB).
        num_bytes = int(np.prod(shape)) * self._dtype.itemsize
        return torch.from_numpy(np.zeros(num_bytes, np.uint8)).view(self._dtype).view(shape)

    def _rehearse(self, rows: int, length: int, num_blocks: int) -> None:
        """Prefill `rows` prompts of `length` tokens and decode once, through a slot table of its own."""
        slots = Slots(rows, length + 2, self._config.block_size, num_blocks)
        needed = -(-(length + 1) // self._config.block_size)
        blocks = pack(i % num_blocks for i in range(needed))
        sampling = Sampling(temperature=1.0, top_p=0.9)
        prompt = pack([0] * length)
        admitted = [Admit(slot, prompt, length, 0, blocks, sampling) for slot in range(rows)]
        first = StepPlan(0, b"", admitted, b"", pack(range(rows)), pack([length] * rows))
        for plan in (first, StepPlan(1, b"", [], b"", None, None)):
            batch = slots.apply(plan)
            slots.commit(batch, self.execute(slots, batch).tokens)
