"""Stands for a Hopper card on a CPU: does, in fp64, what conv3x3.cu does with the arguments of a launch.

Tile by tile, with the copy engine's boxes, which read zeros where a matrix ends and write nothing there. What it shows
is that the host lays out pixels, taps, history and statistics as the kernel walks them.
"""

import ctypes
import itertools

import torch

from vae_accel.kernels import bordered, conv, conv3x3, nvrtc, upsample_conv


class Box:
    """A tensor map: `sizes` from the innermost dimension."""

    def __init__(self, x, sizes, strides, box):
        assert all(stride * x.element_size() % 16 == 0 for stride in strides) and x.data_ptr() % 16 == 0
        assert box[0] * x.element_size() in (64, 128) and max(box) <= 256
        reach = sum((size - 1) * stride for size, stride in zip(sizes, [1, *strides], strict=True))
        assert x.storage_offset() + reach < x.untyped_storage().nbytes() // x.element_size()
        self.whole = x.as_strided(sizes[::-1], [*strides[::-1], 1], x.storage_offset())

    def read(self, row, rows, column, columns):
        out = torch.zeros(rows, columns, dtype=torch.float64)
        part = self.whole[row : row + rows, column : column + columns]
        out[: part.shape[0], : part.shape[1]] = part
        return out

    def write(self, frame, row, column, value):
        part = self.whole[frame, row : row + value.shape[0], column : column + value.shape[1]]
        part.copy_(value[: part.shape[0], : part.shape[1]])


class Card:
    """`install` puts it in the place of the driver; `launches` are the macros of every launch."""

    def __init__(self, processors=3):
        self.launches, self.processors = [], processors

    def install(self, monkeypatch):
        for module in (conv, upsample_conv):
            monkeypatch.setattr(module, "unsupported", lambda x, weight, padding, **more: None)
        monkeypatch.setattr(upsample_conv, "folded_taps", folded)
        monkeypatch.setattr(conv3x3, "is_ready", lambda device: True)
        monkeypatch.setattr(conv3x3, "_processors", lambda device: self.processors)
        monkeypatch.setattr(conv3x3, "TensorMap", Box)
        monkeypatch.setattr(nvrtc, "load", lambda program, shared, card: program)
        monkeypatch.setattr(nvrtc, "launch", self.launch)
        for cached in (conv3x3._identity, conv3x3._kernel, conv3x3._form):
            cached.cache_clear()
        return self

    def launch(self, program, grid, threads, shared, arguments, card):
        macro = {name: int(value) for name, value in (option[2:].split("=") for option in program.options)}
        assert threads == 128 * (macro["CONSUMERS"] + 1) and shared <= conv3x3.SHARED and grid <= self.processors
        self.launches.append(macro)
        x, _, history, _, w, _, residual, _, one, _, out, bias, head, partials, s, scales = arguments
        assert (macro["OPERANDS"] == 2) == (scales.value is not None)
        scales = torch.ones(s.O) if scales.value is None else memory(scales, s.O, torch.float32)
        dtype = torch.bfloat16 if macro["BRAIN"] else torch.float16
        bias = torch.zeros(s.O) if bias.value is None else memory(bias, s.O, dtype)
        memory(head, s.first * s.O, dtype).zero_()
        kind, n = conv3x3.KINDS[macro["KIND"]], macro["N"]
        sums, at_once, phases = 1 + (kind != "direct"), 1 + (kind in ("pairs", "lines")), 1 + (kind == "upsample")
        rows = 64 * macro["BLOCKS"] // sums
        parts = None if partials.value is None else memory(partials, 3 * s.frames * s.units * s.chunks, torch.float32)
        if kind == "lines":
            clear_behind(memory(head, bordered.Geometry(s.frames, 2 * s.H, s.W).pixels * s.O, dtype).view(-1, s.O), s)
        for tile in range(s.tiles_m * s.tiles_n * s.frames * phases):
            n0, phase, m = tile % s.tiles_n * n, tile // s.tiles_n % phases, tile // (s.tiles_n * phases)
            frame = m // s.tiles_m
            for warpgroup in range(macro["CONSUMERS"]):
                o0 = (m % s.tiles_m * macro["CONSUMERS"] + warpgroup) * rows
                row = o0 + torch.arange(rows)
                inside = (row < s.H * s.ROW) & (row % s.ROW < s.W)
                line, column = o0 // rows // s.across, o0 // rows % s.across * rows
                if kind == "lines":
                    inside = (line < s.H) & (column + torch.arange(rows) < s.W)

                def product(pixels, at, kh, kw, n0, tap, o0=o0):
                    a = pixels.read(at + o0 + kh * s.ROW + kw, rows, 0, s.I)
                    return a @ w.read(n0, n, tap * s.I, s.I).T

                def line_taps(j, index, n0=n0, frame=frame, line=line, column=column):
                    """The three taps of a line of transformed picture `j`, by the weights of tap `3 index` on."""
                    at = (4 * frame + j) * s.FRAME + line * s.ROW + column
                    return sum(product(x, at, 1, kw, n0, 3 * index + kw, 0) for kw in range(3))

                def taps(pixels, at, index, n0=n0):
                    """All 3x3 taps of the picture at `at` pixels, by the weights of tap `9 index` on."""
                    return sum(product(pixels, at, tap // 3, tap % 3, n0, 9 * index + tap) for tap in range(9))

                if at_once == 2:
                    m0, m1, m2, m3 = (
                        line_taps(j, i) if kind == "lines" else taps(x, (4 * frame + j) * s.FRAME, i)
                        for j, i in enumerate((2, 0, 1, 3))
                    )
                    found = [m0 + m1 + m2, m1 - m2 + m3]
                elif kind == "upsample":
                    found = [
                        sum(
                            product(x, frame * s.FRAME, phase + u, b + v, (2 * phase + b) * s.O + n0, 2 * u + v)
                            for u in range(2)
                            for v in range(2)
                        )
                        for b in range(2)
                    ]
                else:
                    sample, t = frame // s.T, frame % s.T - s.before
                    found = [torch.zeros(rows, n, dtype=torch.float64)]
                    for j in range(0 if s.repeat else max(-t - s.kept, 0), s.KT):
                        if t + j < 0 and not s.repeat:
                            found[0] += taps(history, (sample * s.kept + s.kept + t + j) * s.FRAME, j)
                        else:
                            found[0] += taps(x, (sample * s.S + min(max(t + j, 0), s.S - 1)) * s.FRAME, j)
                for i, value in enumerate(found):
                    lower = frame * (2 * s.H + 1) + 2 * line + i
                    value = value * scales[n0 : n0 + n].double()
                    if s.residual:
                        at = (at_once * frame + i) * s.FRAME + o0 if kind != "lines" else lower * s.ROW + column
                        at += s.first
                        value = value + residual.read(at, rows, n0, n) @ one.read(0, n, 0, n).T
                    value = found[i] = torch.where(inside[:, None], value + bias[n0 : n0 + n].double(), 0).to(dtype)
                    if kind == "upsample":
                        spread(memory(head, place_of(s) * s.O, dtype).view(-1, s.O), value, row, s, frame, phase, i, n0)
                    elif kind != "lines":
                        out.write(at_once * frame + i, o0, n0, value)
                    elif line < s.H:
                        out.write(lower, column, n0, value)
                if parts is not None:
                    chunk = o0 // rows * phases + phase
                    gather(parts, torch.cat(found), inside.repeat(sums), s, macro["NEIGHBOURS"], frame, n0, chunk)


def clear_behind(pixels, s):
    """Zeros behind each line and below each picture."""
    lines = pixels[s.first :].view(s.frames, 2 * s.H + 1, s.ROW, s.O)
    lines[:, :, s.W :] = 0
    lines[:, -1] = 0


def place_of(s):
    return bordered.Geometry(s.frames, 2 * s.H, 2 * s.W).pixels


def spread(pixels, value, row, s, frame, a, b, n0):
    """Pixels of phase (a, b) to where they belong in the large picture, and zeros of the border where theirs would."""
    y, v = row // s.ROW, row % s.ROW
    written = (y + a <= s.H) & (v <= s.W)
    target = (frame * (2 * s.H + 1) + 2 * y + a + 1) * (2 * s.W + 2) + 2 * v + b + 1
    pixels[target[written], n0 : n0 + value.shape[1]] = value[written]


def folded(weight, dtype, depth, double=False):
    """What `upsample_conv.folded_taps` makes, in torch: [4 O, 2 * 2 * I]."""
    assert depth == 1 and not double
    halves = ((0, (1, 2)), ((0, 1), 2))
    phases = [
        torch.stack(
            [
                torch.stack([weight[:, :, u][..., v].double().reshape(*weight.shape[:2], -1).sum(2) for v in cols])
                for u in rows
            ]
        )
        for rows, cols in itertools.product(halves, halves)
    ]
    return torch.stack(phases).permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1).to(dtype).contiguous()


def gather(parts, value, inside, s, neighbours, frame, n0, chunk):
    units = value[inside].double().unflatten(1, (-1, neighbours)).movedim(1, 0).flatten(1)
    found = torch.zeros(3, units.shape[0])
    if units.shape[1]:
        mean = units.mean(1)
        found = torch.stack((mean, (units - mean[:, None]).square().sum(1), torch.full_like(mean, units.shape[1])))
    first = n0 // neighbours
    parts.view(3, s.frames, s.units, s.chunks)[:, frame, first : first + len(units), chunk] = found.float()


def memory(pointer, count, dtype):
    size = count * dtype.itemsize
    return torch.frombuffer((ctypes.c_char * size).from_address(pointer.value), dtype=dtype)
