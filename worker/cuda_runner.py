"""The runner for GPUs: loads a model, sizes its cache, and keeps steps queued on the device.

Knows the life of a worker on a GPU; the slot table, a step and the graphs have files of their own. Nothing
here waits for the device while steps are under way.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ..ipc.config import EngineConfig
from ..ipc.messages import Admit, Argument, Sampling, StepPlan, pack
from .compiling import Compiler
from .constraints import ConstraintBuilder, Constraints
from .device_slots import DeviceSlots, Work
from .device_step import MORE_RESULTS, RESULTS, DeviceStep, Logits
from .fused import fold_norms
from .graphs import Graphs, Recorder, graph_sizes, most_useful
from .host_memory import keep_freed_memory
from .invariance import check_fixed_order
from .kv_cache import CacheSize, cuda_budget, size_cache
from .models import build_model
from .models.causal_lm import CausalLM, LayerCache
from .packed_graphs import MAX_TOKENS, PackedGraphs, Shape, tokens_while_launching
from .parallel import TensorParallel, check_devices, connect, open_mailboxes
from .slots import I64, new_blocks
from .under_way import Drawn, UnderWay
from .weights import load_weights, weights_bytes, weights_checksum

_WARM_UP_TOKENS = 32
_SHORT_PROMPT = 7
"""Tokens. Up to 8 take other kernels than more do, and an odd number other forms of some (alignments)."""


class CudaRunner:
    """A worker's runner with a network on one GPU per rank."""

    def __init__(
        self, config: EngineConfig, rank: int, rendezvous: str, compiler: Compiler | None = None
    ) -> None:
        """Without a `compiler` each kernel is compiled where it is first launched."""
        self._config, self._rank, self._rendezvous = config, rank, rendezvous
        self._compiler = compiler
        self._device = torch.device("cuda", rank)
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self._tp = TensorParallel()
        self._build_constraints = ConstraintBuilder(config)
        self._model: CausalLM
        self._step: DeviceStep
        self._graphs: Graphs[None] | None = None
        self._special_graphs: Graphs[Logits] | None = None
        self._filtered_graphs: Graphs[None] | None = None
        self._packed_graphs: PackedGraphs | None = None
        self._latest: UnderWay | None = None
        """The step that was submitted last."""
        self._events = [torch.cuda.Event() for _ in range(RESULTS)]
        self._num_events = 0
        self._chores = self._prepare()
        self._prepared: deque[Callable[[], None]] = deque()
        """What takes each finished preparation into use."""
        self._num_in_use = 0
        self._num_results = 0
        self._sizes = (0, 0)

    # --- starting ------------------------------------------------------------------------------------

    @torch.inference_mode()
    def load(self, progress: Callable[[str], None]) -> CacheSize:
        """Bring the weights onto the device. Raises ConfigError for files that are not as they must be."""
        config = self._config
        check_devices(config.tensor_parallel_size, torch.cuda.device_count())
        torch.cuda.set_device(self._device)
        keep_freed_memory()
        if config.tensor_parallel_size > 1:
            progress("connect ranks")
            self._tp = self._connect()
        progress("load weights")
        self._model = self._load_model()
        if config.batch_invariant:
            progress("check that kernels are batch-invariant")
            model, heads = self._model, int(config.hf_config["num_attention_heads"])
            check_fixed_order(heads, model.num_kv_heads, model.head_dim, self._dtype, self._device)
        progress("compile kernels")
        self._compile_start()
        progress("size KV cache")
        return self._size()

    @torch.inference_mode()
    def allocate(self, num_blocks: int, max_model_len: int) -> None:
        """Make the KV cache, with one block more for padding, and the slot table."""
        self._sizes = (num_blocks, max_model_len)
        self._step = self._new_step(self._config.max_num_seqs, max_model_len, num_blocks)
        recordable = self._tp.size == 1 or (self._tp.peers is not None and self._step.is_fused)
        if recordable and not self._config.enforce_eager:
            sizes = graph_sizes(self._config.max_num_seqs)
            step = self._step
            recorder = Recorder(self._tp.silence, partial(self._compile_ahead, step))

            def rehearse(rows: int) -> None:
                step.decode(rows, rehearsal=True)

            self._graphs = Graphs(recorder, step.decode, rehearse, sizes)
            # Fewer sizes of these: each is recorded where it is first needed, while everybody waits.
            few = most_useful(sizes)
            self._special_graphs = Graphs(recorder, self._special_logits, rehearse, few)
            if step.has_all_logits:
                self._filtered_graphs = Graphs(
                    recorder,
                    partial(step.decode, filtered=True),
                    partial(step.decode, rehearsal=True, filtered=True),
                    few,
                )
            if step.is_fused:
                self._packed_graphs = PackedGraphs(recorder, step, self._most_packed_tokens())

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile what a first request needs, and record a graph for it."""
        first = self._first_work()
        _rehearse(self._temporary_step(*first), *first)
        if self._graphs is not None:
            self._graphs.record(1)
            self._graphs.use(1)
        torch.cuda.synchronize()

    @torch.inference_mode()
    def idle(self) -> bool:
        """Prepare one more kind of step. The other ranks do so at other times: nothing waits for them."""
        finished = next(self._chores, None)
        if finished is None:
            return False
        self._prepared.append(finished)
        return True

    def use_prepared(self, count: int) -> None:
        """Steps may from now on be run in the ways that the first `count` calls of `idle` have prepared."""
        while self._num_in_use < count:
            self._prepared.popleft()()
            self._num_in_use += 1

    def _prepare(self) -> Iterator[Callable[[], None]]:
        """What makes steps faster and can wait, the most useful first. Each takes some 30 ms.

        Yields what takes it into use; on all ranks the same.
        """
        sizes = graph_sizes(self._config.max_num_seqs)
        graphs, packed_graphs = self._graphs, self._packed_graphs
        if graphs is not None:
            for size in most_useful(sizes):
                graphs.record(size)
                yield partial(graphs.use, size)
        packed: Iterator[Shape] = iter(()) if packed_graphs is None else packed_graphs.record_next()
        for shape in packed:
            assert packed_graphs is not None
            yield partial(packed_graphs.use, shape)
            if shape.decodes:
                break
        if graphs is not None:
            for size in sizes:
                graphs.record(size)
                yield partial(graphs.use, size)
        self._step.prepare_rules()
        yield lambda: None
        others: tuple[Graphs[Any] | None, ...] = (self._filtered_graphs, self._special_graphs)
        for kind in others:
            for size in () if kind is None else most_useful(sizes):
                assert kind is not None
                kind.record(size)
                yield partial(kind.use, size)
        for shape in packed:
            assert packed_graphs is not None
            yield partial(packed_graphs.use, shape)

    # --- compiling -----------------------------------------------------------------------------------

    def _compile_start(self) -> None:
        """What `_size` and `warm_up` launch, and what a first request of few tokens would wait for."""
        config, first, most = self._config, self._first_work(), self._most_work()
        step = self._temporary_step(*first)

        def rest() -> None:
            _rehearse(self._temporary_step(*most), *most)
            short = min(_SHORT_PROMPT, first[1])
            _rehearse(self._temporary_step(1, short), 1, short)
            self._new_step(config.max_num_seqs, config.max_model_len, 1).decode(1, rehearsal=True)

        # Less than half of it shows whether anything is to be compiled.
        for launch in (partial(_rehearse, step, *first), rest):
            self._compile_ahead(step, launch)

    def _compile_ahead(self, step: DeviceStep, launch: Callable[[], None]) -> None:
        """On a first start, compile side by side what `launch` launches, in `step` or others like it."""
        if self._compiler is None or not step.is_fused:  # a model's `forward` wants all layers
            return
        layers = self._model.layers
        self._model.layers = layers[:2]  # all but the first launch the same
        try:
            with self._tp.silence():
                self._compiler.ahead(launch, self._device)
        finally:
            self._model.layers = layers

    # --- sleeping ------------------------------------------------------------------------------------

    @torch.inference_mode()
    def release(self, keep_weights: bool) -> None:
        """Everything on the device goes, the graphs with it: they hold addresses."""
        torch.cuda.synchronize()
        self._graphs = self._special_graphs = self._filtered_graphs = self._packed_graphs = None
        self._latest = None
        self._chores = iter(())
        self._prepared.clear()
        self._num_in_use = self._num_results = 0
        self._kept_logits.cache_clear()
        del self._step
        if keep_weights:
            self._model.to("cpu")
        else:
            del self._model
        gc.unfreeze()
        gc.collect()
        torch.cuda.empty_cache()

    @torch.inference_mode()
    def restore_weights(self) -> None:
        self._model = self._model.to(self._device) if hasattr(self, "_model") else self._load_model()

    def restore_cache(self) -> None:
        self.allocate(*self._sizes)
        self.warm_up()
        self._chores = self._prepare()

    def memory(self) -> dict[str, Argument]:
        free, total = torch.cuda.mem_get_info(self._device)
        return {
            "weights_bytes": weights_bytes(self._model) if hasattr(self, "_model") else 0,
            "allocated_bytes": torch.cuda.memory_allocated(self._device),
            "reserved_bytes": torch.cuda.memory_reserved(self._device),
            "free_bytes": free,
            "total_bytes": total,
        }

    def weights_checksum(self) -> str:
        return weights_checksum(self._model)

    # --- steps ---------------------------------------------------------------------------------------

    @torch.inference_mode()
    def submit(self, plan: StepPlan) -> UnderWay:
        """Queue the step's kernels, but for a draw that must know the tokens of the step before."""
        if self._latest is not None:
            self._latest.settle()
        if self._config.poison_blocks:
            self._step.poison(new_blocks(plan, self._config.block_size))
        work = self._step.slots.apply(plan)
        places: I64 | slice = slice(work.num_sampling)
        appended = work.num_sampling > 0
        logits: Logits | None = None
        if work.decode and work.num_rows:
            logits = self._decode(work)
        elif work.num_rows:
            found = None if self._packed_graphs is None else self._packed_graphs.run(work)
            if found is None:
                logits = run_packed(self._step, work)
            else:
                places, appended = found, True
        event = self._events[self._num_events % RESULTS]
        self._num_events += 1
        row = self._step.results[self._num_results % RESULTS]
        self._num_results += appended
        under = UnderWay(plan.step, event, row, places, work.prompts)
        if logits is None:
            under.launched()
        else:
            under.draw_later(partial(self._draw, logits, work, under), self._latest if work.ruled else None)
        self._latest = under
        return under

    def _decode(self, work: Work) -> Logits | None:
        """Run a decode step; where the host has a part in its draw, this remains to be done."""
        step, rows = self._step, work.num_rows
        if work.needs_host or (work.filtered and not step.has_all_logits):
            graphs = self._special_graphs
            logits = step.decode_logits(rows) if graphs is None else graphs.run(rows)
            if work.needs_host:
                return logits
            step.draw(logits, filtered=True)
        elif self._graphs is None:
            step.decode(rows, filtered=work.filtered)
        elif work.filtered:
            assert self._filtered_graphs is not None
            self._filtered_graphs.run(rows)
        else:
            self._graphs.run(rows)
        return None

    @torch.inference_mode()
    def _draw(self, logits: Logits, work: Work, under: UnderWay) -> Drawn:
        constraints, sampled = self._step.slots.constraints, work.slots[work.sampling]
        shown = self._step.draw_special(logits, work)
        constraints.expect(sampled, under.tokens)
        return Drawn(shown, constraints.failed(sampled))

    def _special_logits(self, rows: int) -> Logits:
        """Logits where every graph leaves them: kept apart they would fill the memory."""
        logits = self._step.decode_logits(rows)
        kept = self._kept_logits(logits.logits.dtype, logits.logits.shape[1])[:rows]
        kept.copy_(logits.logits)
        return Logits(kept, logits.slots, logits.ends)

    @cache  # noqa: B019 (the runner lives as long as its process)
    def _kept_logits(self, dtype: torch.dtype, columns: int) -> Tensor:
        rows = len(self._step.slots.rows)
        return torch.empty(rows, columns, dtype=dtype, device=self._device)

    def _load_model(self) -> CausalLM:
        config = self._config
        model = build_model(
            config.architecture, config.hf_config, self._dtype, self._device, self._tp, config.max_model_len
        )
        load_weights(model, config, self._device, self._tp)
        fold_norms(model)
        return model.eval()

    def _connect(self) -> TensorParallel:
        """Meet the other ranks. The mailboxes have room for what stands in CUDA graphs."""
        config = self._config
        tp = connect(self._rank, config.tensor_parallel_size, self._device, self._rendezvous)
        rows = graph_sizes(config.max_num_seqs)[-1]
        hidden = int(config.hf_config["hidden_size"])
        elements, largest = (rows + MAX_TOKENS) * hidden, config.max_num_batched_tokens * hidden
        return open_mailboxes(tp, self._device, self._dtype, elements, rows + MORE_RESULTS, largest)

    def _most_packed_tokens(self) -> int:
        """Of prompts, in a CUDA graph. The mailboxes of several ranks have room for no more."""
        if self._tp.size > 1:
            return MAX_TOKENS
        weights = sum(p.numel() for name, p in self._model.named_parameters() if "layers." in name)
        return max(MAX_TOKENS, tokens_while_launching(weights // self._model.num_layers))

    # --- sizes ---------------------------------------------------------------------------------------

    def _size(self) -> CacheSize:
        """Run the largest step, to see what is left beside it."""
        config = self._config
        rows, length = self._most_work()
        held = torch.cuda.memory_allocated(self._device)
        step = self._temporary_step(rows, length)
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        _rehearse(step, rows, length)
        profiled = torch.cuda.max_memory_allocated(self._device) - before
        del step
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        budget = cuda_budget(config, free=free, total=total, held=held, profiled=profiled)
        return size_cache(config, self._block_bytes(), budget)

    def _most_work(self) -> tuple[int, int]:
        """Rows of the largest step, and the tokens of each."""
        config = self._config
        rows = min(config.max_num_seqs, config.max_num_batched_tokens)
        return rows, min(config.max_num_batched_tokens // rows, config.max_model_len - 1)

    def _first_work(self) -> tuple[int, int]:
        """The same of what a first request may be."""
        config = self._config
        return 1, max(1, min(_WARM_UP_TOKENS, config.max_num_batched_tokens, config.max_model_len - 2))

    def _block_bytes(self) -> int:
        model, config = self._model, self._config
        per_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * self._dtype.itemsize
        return config.block_size * per_token

    def _new_step(self, num_slots: int, max_model_len: int, num_blocks: int) -> DeviceStep:
        model, block_size = self._model, self._config.block_size
        shape = (num_blocks + 1, block_size, model.num_kv_heads, model.head_dim)
        caches: list[LayerCache] = [
            (
                torch.zeros(shape, dtype=self._dtype, device=self._device),
                torch.zeros(shape, dtype=self._dtype, device=self._device),
            )
            for _ in range(model.num_layers)
        ]
        slots = DeviceSlots(
            self._device,
            num_slots,
            max_model_len,
            block_size,
            num_blocks,
            Constraints(self._build_constraints),
        )
        heads = int(self._config.hf_config["num_attention_heads"]) // self._tp.size
        config = self._config
        return DeviceStep(
            model,
            caches,
            slots,
            heads,
            config.logprobs_mode,
            self._tp,
            batch_invariant=config.batch_invariant,
        )

    def _temporary_step(self, rows: int, length: int) -> DeviceStep:
        """For `_rehearse`."""
        return self._new_step(rows, length + 2, -(-(length + 1) // self._config.block_size))


def run_packed(step: DeviceStep, work: Work) -> Logits | None:
    """A step of any composition; where the host has a part in its draw, this remains to be done."""
    logits = step.packed_logits(work)
    if logits is None or work.needs_host:
        return logits
    step.draw(logits, filtered=work.filtered)
    return None


def _rehearse(step: DeviceStep, rows: int, length: int) -> None:
    """Prefill `rows` prompts of `length` tokens and decode once, all in the same blocks: shapes matter."""
    slots = step.slots
    blocks = pack(range(slots.padding_block))
    prompt = pack([0] * length)
    admitted = [Admit(slot, prompt, length, 0, blocks, Sampling()) for slot in range(rows)]
    run_packed(step, slots.apply(StepPlan(0, b"", admitted, b"", pack(range(rows)), pack([length] * rows))))
    work = slots.apply(StepPlan(1, b"", [], b"", None, pack([1] * rows)))
    step.decode(work.num_rows)
