// A convolution with 3x3 taps in space as an implicit GEMM for sm_90a: what Triton cannot say of a Hopper card.
//
// Pixels are rows of one matrix [pixels, C] in a bordered clip (bordered.py). A program is persistent: one warp fetches
// by the copy engine, CONSUMERS warpgroups multiply by wgmma m64 x N x 32 bytes. N is 96, 128 or 192, so that no column is
// wasted; and the three taps of a row come from one tile of pixels in shared memory, read at three offsets: a third of
// what a tile a tap would draw from the L2, which bounds Triton's form (platforms/cuda/README.md).
//
// N          columns of a tile
// KIND       DIRECT; PAIRS: F(2, 3) along time (winograd.py), two sums for two frames; LINES: along height
//            (line_pairs.py), two sums for two lines of a picture; UPSAMPLE: behind a nearest 2x (upsample_conv.py),
//            two sums for the left and the right of large pixels, tiles for upper and lower ones
// CONSUMERS  warpgroups that multiply
// BLOCKS     their accumulators, in blocks of 64 rows; of two sums half of them for either
// NA, NB     stages of pixels and of weights
// NEIGHBOURS channels that share a part of the next GroupNorm's statistics (group_statistics.py), 1 or 2; 0: none
// BRAIN      the result is bf16, else fp16
// OPERANDS   HALF, BFLOAT or E4M3, of which a step has twice the channels in as many bytes; their sums are of the
//            quantized numbers, and multiplied by `scales`, one a column, before a residual is added
#define DIRECT 0
#define PAIRS 1
#define UPSAMPLE 2
#define LINES 3
#define WINOGRAD (KIND == PAIRS || KIND == LINES)
#define HALF 0
#define BFLOAT 1
#define E4M3 2

constexpr int TAIL = N == 96;                   // steps of K are 128 + 64 bytes, else 128
constexpr int BYTES = TAIL ? 192 : 128;
constexpr int STEP = OPERANDS == E4M3 ? BYTES : BYTES / 2, WIDE = BYTES / 2;  // channels; WIDE: of a residual
constexpr int SUMS = KIND == DIRECT ? 1 : 2, SUM = BLOCKS / SUMS;  // blocks of one sum
constexpr int PHASES = KIND == UPSAMPLE ? 2 : 1;  // tiles over the same pixels
constexpr int AT_ONCE = WINOGRAD ? 2 : 1;       // frames of the result, or lines
constexpr int KH = KIND == LINES ? 1 : 3;       // taps in height, those that are not transformed
constexpr int ROWS = 64 * SUM;                  // pixels of a warpgroup
constexpr int BOX = ROWS + 2;                   // and the two that the other taps of a row reach
constexpr int TILE = CONSUMERS * ROWS;          // pixels of a program
constexpr int A64 = (BOX + 7) / 8 * 1024, A32 = TAIL * A64 / 2, APART = A64 + A32, ASTAGE = CONSUMERS * APART;
constexpr int B64 = N * 128, B32 = TAIL * N * 64, BSTAGE = B64 + B32;
constexpr int CHUNK = N == 128 ? 64 : 96;       // columns on their way out at a time
constexpr int OUT = 64 * CHUNK * 2;
constexpr u32 ABYTES = CONSUMERS * BOX * BYTES, BBYTES = N * BYTES;

// The operands of the products, and those of the residual, which is a product with the identity.
struct Operands { static constexpr int kind = OPERANDS; };
struct Residual { static constexpr int kind = BRAIN ? BFLOAT : HALF; };
// The blocks of either sum.
struct P { static constexpr int first = 0; };
struct Q { static constexpr int first = SUMS == 2 ? SUM : 0; };

// `SUM` blocks from block FIRST of the accumulators, by one tap of a step of K.
template <class Kind, int FIRST>
__device__ __forceinline__ void multiply(float (&d)[BLOCKS][N / 2], u32 a, u32 b, int kw) {
  #pragma unroll
  for (int k = 0; k < 4; k++)
    #pragma unroll
    for (int m = 0; m < SUM; m++)
      wgmma<Kind::kind>(d[FIRST + m], desc128(a + (kw * 128 + m * 8192 + k * 32) / 16), desc128(b + k * 2));
  #pragma unroll
  for (int k = 0; k < 2 * TAIL; k++)
    #pragma unroll
    for (int m = 0; m < SUM; m++)
      wgmma<Kind::kind>(
        d[FIRST + m], desc64(a + (A64 + kw * 64 + m * 4096 + k * 32) / 16), desc64(b + (B64 + k * 32) / 16));
}

// Keeps the compiler from moving a sum over the products that are in flight.
__device__ __forceinline__ void pin(float (&d)[BLOCKS][N / 2]) {
  #pragma unroll
  for (int m = 0; m < BLOCKS; m++)
    #pragma unroll
    for (int i = 0; i < N / 2; i++) asm volatile("" : "+f"(d[m][i]) :: "memory");
}

struct Place { int n0, o0, frame, phase; };  // first column, first pixel in its frame, frame (or pair of frames)
struct Begin { int x, y, line, column; };    // of a warpgroup's pixels: in a frame of x, in one of the result


struct Sizes {
  int frames;     // of the result, or pairs of them
  int T, S;       // frames of a sample of the result, and of x
  int KT, before; // taps in time, frames in front of a sample
  int kept;       // of them in `history`
  int repeat;     // frames beyond those of x are its first and last
  int tiles_m, tiles_n;
  int FRAME, ROW, H, W;  // bordered.Geometry of x
  int first;      // of the result
  int I, O, residual;
  int units, chunks;  // of the statistics
  int across;     // tiles of ROWS pixels in a line, of LINES
};

__device__ __forceinline__ Place place_of(int tile, const Sizes& s) {  // neighbours share pixels
  const int m = tile / (s.tiles_n * PHASES);
  return {tile % s.tiles_n * N, m % s.tiles_m * TILE, m / s.tiles_m, tile / s.tiles_n % PHASES};
}

// Pixels are counted through a frame, but a pair of lines is tile by tile: it has its lines one behind the other.
__device__ __forceinline__ Begin begin_of(int pixel, const Sizes& s) {
  if (KIND != LINES) return {pixel, pixel, 0, 0};
  const int tile = pixel / ROWS, line = tile / s.across, column = tile % s.across * ROWS;
  return {(line + 1) * s.ROW + column, 2 * line * s.ROW + column, line, column};
}

// Taps in time over frames of zeros.
__device__ __forceinline__ int unseen(const Place& p, const Sizes& s) {
  return s.repeat ? 0 : max(s.before - p.frame % s.T - s.kept, 0);
}

extern "C" __global__ void __launch_bounds__(128 * (CONSUMERS + 1), 1) conv3x3(
    const __grid_constant__ Map x64, const __grid_constant__ Map x32, const __grid_constant__ Map h64,
    const __grid_constant__ Map h32, const __grid_constant__ Map w64, const __grid_constant__ Map w32,
    const __grid_constant__ Map r64, const __grid_constant__ Map r32, const __grid_constant__ Map e64,
    const __grid_constant__ Map e32, const __grid_constant__ Map out, const u16* bias, uint4* pixels, float* partials,
    const __grid_constant__ Sizes s, const float* scales) {
  extern __shared__ unsigned char raw[];
  const u32 base = (smem(raw) + 1023) & ~1023u;
  const u32 as = base, bs = as + NA * ASTAGE, outs = bs + NB * BSTAGE, bars = outs + CONSUMERS * OUT;
  const u32 fullA = bars, emptyA = fullA + 8 * NA, fullB = emptyA + 8 * NA, emptyB = fullB + 8 * NB;
  const u32 biases = emptyB + 8 * NB;
  const int wg = __shfl_sync(~0u, threadIdx.x >> 7, 0), warp = threadIdx.x >> 5 & 3, lane = threadIdx.x & 31;
  for (int i = threadIdx.x; i < s.O; i += blockDim.x)
    asm volatile("st.shared.b16 [%0], %1;" :: "r"(biases + 2 * i), "h"(bias ? bias[i] : (u16)0) : "memory");
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < s.first * s.O / 8; i += gridDim.x * blockDim.x)
    pixels[i] = {0, 0, 0, 0};  // before the first picture
#if KIND == LINES  // and what no tile covers: the border behind lines and pictures
  const int behind = s.ROW - s.W, lines = 2 * s.H, each = lines * behind + s.ROW;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < s.frames * each * s.O / 8; i += gridDim.x * blockDim.x) {
    const int pixel = i / (s.O / 8), r = pixel % each, below = r - lines * behind;
    const int line = pixel / each * (lines + 1) + (below < 0 ? r / behind : lines);
    pixels[(s.first + line * s.ROW + (below < 0 ? s.W + r % behind : below)) * (s.O / 8) + i % (s.O / 8)] = {0, 0, 0, 0};
  }
#endif
  if (threadIdx.x == 0) {
    for (int i = 0; i < NA; i++) { init(fullA + 8 * i, 1); init(emptyA + 8 * i, 4 * CONSUMERS); }
    for (int i = 0; i < NB; i++) { init(fullB + 8 * i, 1); init(emptyB + 8 * i, 4 * CONSUMERS); }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    seen_by_copies();
  }
  __syncthreads();
  const int tiles = s.tiles_m * s.tiles_n * s.frames * PHASES, KB = s.I / STEP;
  Ring ra{0, 0}, rb{0, 0};

  if (wg == CONSUMERS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(CONSUMERS == 3 ? 32 : 40));
    if (warp == 0 && lane == 0) {
      int at[CONSUMERS];  // pixels in their frame
      auto loadA = [&](const Map* m64, const Map* m32, int row, int c) {
        wait(emptyA + 8 * ra.slot, ra.phase ^ 1);
        const u32 bar = fullA + 8 * ra.slot;
        u32 to = as + ra.slot * ASTAGE;
        expect(bar, ABYTES);
        #pragma unroll
        for (int i = 0; i < CONSUMERS; i++, to += APART) {
          load(to, m64, bar, c, row + at[i]);
          if (TAIL) load(to + A64, m32, bar, c + 64, row + at[i]);
        }
        next<NA>(ra);
      };
      auto loadB = [&](const Map* m64, const Map* m32, int row, int c) {
        wait(emptyB + 8 * rb.slot, rb.phase ^ 1);
        const u32 bar = fullB + 8 * rb.slot, to = bs + rb.slot * BSTAGE;
        expect(bar, BBYTES);
        load(to, m64, bar, c, row);
        if (TAIL) load(to + B64, m32, bar, c + 64, row);
        next<NB>(rb);
      };
      for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const Place p = place_of(tile, s);
        #pragma unroll
        for (int i = 0; i < CONSUMERS; i++) at[i] = begin_of(p.o0 + i * ROWS, s).x;
#if WINOGRAD
        for (int half = 0; half < 2; half++)
          for (int kh = 0; kh < KH; kh++)
            for (int kb = 0; kb < KB; kb++)
              for (int i = 0; i < 2; i++) {
                const int j = half ? 3 * i : 1 + i, tap = KH * (2 * half + i);  // taps lie in the order of this walk
                loadA(&x64, &x32, (4 * p.frame + j) * s.FRAME + kh * s.ROW, kb * STEP);
                for (int kw = 0; kw < 3; kw++)
                  loadB(&w64, &w32, p.n0, ((tap + kh) * 3 + kw) * s.I + kb * STEP);
              }
#elif KIND == UPSAMPLE
        for (int u = 0; u < 2; u++)
          for (int kb = 0; kb < KB; kb++) {
            loadA(&x64, &x32, p.frame * s.FRAME + (p.phase + u) * s.ROW, kb * STEP);
            for (int b = 0; b < 2; b++)
              for (int v = 0; v < 2; v++)
                loadB(&w64, &w32, (2 * p.phase + b) * s.O + p.n0, (2 * u + v) * s.I + kb * STEP);
          }
#else
        const int n = p.frame / s.T, t = p.frame % s.T - s.before;
        for (int j = unseen(p, s); j < s.KT; j++) {
          const bool past = t + j < 0 && !s.repeat;
          const int frame = past ? (n + 1) * s.kept + t + j : n * s.S + min(max(t + j, 0), s.S - 1);
          for (int kh = 0; kh < 3; kh++)
            for (int kb = 0; kb < KB; kb++) {
              loadA(past ? &h64 : &x64, past ? &h32 : &x32, frame * s.FRAME + kh * s.ROW, kb * STEP);
              for (int kw = 0; kw < 3; kw++) loadB(&w64, &w32, p.n0, (j * 9 + kh * 3 + kw) * s.I + kb * STEP);
            }
        }
#endif
        if (s.residual) {
          #pragma unroll
          for (int i = 0; i < CONSUMERS; i++) at[i] = begin_of(p.o0 + i * ROWS, s).y;
          for (int i = 0; i < AT_ONCE; i++)
            for (int kb = 0; kb < N / WIDE; kb++) {
              const int row = KIND == LINES ? (p.frame * (2 * s.H + 1) + i) * s.ROW : (AT_ONCE * p.frame + i) * s.FRAME;
              loadA(&r64, &r32, row + s.first, p.n0 + kb * WIDE);
              loadB(&e64, &e32, 0, kb * WIDE);
            }
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(CONSUMERS == 3 ? 160 : 232));
    float d[BLOCKS][N / 2];
    const int row = warp * 16 + (lane >> 3 & 1) * 8 + (lane & 7);  // where this lane's row of a stored matrix goes
    const u32 swizzled = row * 64 + (((lane >> 4) ^ (row >> 1 & 3)) << 4), biased = biases + 4 * (lane & 3);
    const u32 mine = wg * APART, stage = outs + wg * OUT;
    u32 freeA = 0, freeB = 0;  // barriers of what the products before the last group read
    u32 at = 0;
    auto release = [&](u32 bar) { if (lane == 0 && bar) arrive(bar); };
    auto waitA = [&]() { wait(fullA + 8 * ra.slot, ra.phase); at = (as + mine >> 4) + ra.slot * (ASTAGE / 16); };
    auto tap = [&](auto kind, auto sum, int kw, bool last) {
      wait(fullB + 8 * rb.slot, rb.phase);
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
      multiply<decltype(kind), decltype(sum)::first>(d, at, (bs >> 4) + rb.slot * (BSTAGE / 16), kw);
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
      release(freeB); release(freeA);
      freeB = emptyB + 8 * rb.slot;
      freeA = last ? emptyA + 8 * ra.slot : 0;
      next<NB>(rb);
      if (last) next<NA>(ra);
    };
    auto row_of_taps = [&](auto sum) {
      waitA();
      tap(Operands{}, sum, 0, false); tap(Operands{}, sum, 1, false); tap(Operands{}, sum, 2, true);
    };
    auto drain = [&]() {
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
      release(freeB); release(freeA);
      freeA = freeB = 0;
      pin(d);
    };
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      const Place place = place_of(tile, s);
      const int o0 = place.o0 + wg * ROWS;
      const Begin begin = begin_of(o0, s);
      #pragma unroll
      for (int m = 0; m < BLOCKS; m++)
        #pragma unroll
        for (int i = 0; i < N / 2; i++) d[m][i] = 0.f;
      pin(d);
#if WINOGRAD
      #pragma unroll
      for (int half = 0; half < 2; half++) {
        #pragma unroll 1
        for (int step = 0; step < KH * KB; step++) { row_of_taps(P{}); row_of_taps(Q{}); }
        if (half == 0) {
          drain();
          #pragma unroll
          for (int m = 0; m < SUM; m++)
            #pragma unroll
            for (int i = 0; i < N / 2; i++) {  // p + q and p - q, in place
              d[SUM + m][i] = d[m][i] - d[SUM + m][i];
              d[m][i] = fmaf(2.f, d[m][i], -d[SUM + m][i]);
            }
          pin(d);
        }
      }
#elif KIND == UPSAMPLE
      #pragma unroll 1
      for (int step = 0; step < 2 * KB; step++) {
        waitA();
        tap(Operands{}, P{}, 0, false); tap(Operands{}, P{}, 1, false);
        tap(Operands{}, Q{}, 1, false); tap(Operands{}, Q{}, 2, true);
      }
#else
      #pragma unroll 1
      for (int step = 0; step < 3 * KB * (s.KT - unseen(place, s)); step++) row_of_taps(P{});
#endif
#if OPERANDS == E4M3
      drain();
      #pragma unroll
      for (int j = 0; j < N / 8; j++) {
        const float2 scale = columns(scales + place.n0 + 8 * j + 2 * (lane & 3));
        #pragma unroll
        for (int m = 0; m < BLOCKS; m++)
          #pragma unroll
          for (int i = 0; i < 4; i += 2) {
            d[m][4 * j + i] *= scale.x;
            d[m][4 * j + i + 1] *= scale.y;
          }
      }
      pin(d);
#endif
      if (s.residual) {
        #pragma unroll 1
        for (int kb = 0; kb < N / WIDE; kb++) { waitA(); tap(Residual{}, P{}, 0, true); }
#if WINOGRAD
        #pragma unroll 1
        for (int kb = 0; kb < N / WIDE; kb++) { waitA(); tap(Residual{}, Q{}, 0, true); }
#endif
      }
      drain();
      u32 pictures = 0;  // of this lane's two rows of a block, those that are no border, which is stored as zeros
      #pragma unroll
      for (int i = 0; i < 2 * SUM; i++) {
        const int mine = i / 2 * 64 + warp * 16 + (lane >> 2) + i % 2 * 8, r = o0 + mine;
        const bool picture = KIND == LINES ? begin.line < s.H && begin.column + mine < s.W
                                           : r < s.H * s.ROW && r % s.ROW < s.W;
        pictures |= u32(picture) << i;
      }
      auto inside = [&](int m, int i) { return 0u - (pictures >> (m % SUM * 2 + i) & 1); };
      #pragma unroll
      for (int j = 0; j < N / 8; j++) {
        u32 two;
        asm volatile("ld.shared.b32 %0, [%1];" : "=r"(two) : "r"(biased + 2 * (place.n0 + 8 * j)) : "memory");
        #pragma unroll
        for (int m = 0; m < BLOCKS; m++)
          #pragma unroll
          for (int i = 0; i < 4; i += 2) {
            d[m][4 * j + i] += low<BRAIN>(two);
            d[m][4 * j + i + 1] += high<BRAIN>(two);
          }
      }
#if NEIGHBOURS
      // Mean and squared deviations of a warp's rows by lanes that share columns, then of its warpgroup's, by Chan.
      if (threadIdx.x % 128 == 0) read_out();
      together(wg);
      constexpr int UNITS = N / NEIGHBOURS;
      const float number = over_rows(NEIGHBOURS * SUMS * __popc(pictures));
      const float share = 1 / fmaxf(number, 1);
      #pragma unroll
      for (int j = 0; j < N / 8; j++)
        #pragma unroll
        for (int e = 0; e < 2 / NEIGHBOURS; e++) {
          float sum = 0, m2 = 0;
          #pragma unroll
          for (int m = 0; m < BLOCKS; m++)
            #pragma unroll
            for (int i = 0; i < 2; i++) {
              const u32 two = pack<BRAIN>(d[m][4 * j + 2 * i], d[m][4 * j + 2 * i + 1]) & inside(m, i);
              sum += NEIGHBOURS == 2 ? low<BRAIN>(two) + high<BRAIN>(two) : e ? high<BRAIN>(two) : low<BRAIN>(two);
            }
          const float mean = over_rows(sum) * share;
          #pragma unroll
          for (int m = 0; m < BLOCKS; m++)
            #pragma unroll
            for (int i = 0; i < 2; i++) {
              const u32 two = pack<BRAIN>(d[m][4 * j + 2 * i], d[m][4 * j + 2 * i + 1]);
              const float a = low<BRAIN>(two) - mean, b = high<BRAIN>(two) - mean;
              const float square = NEIGHBOURS == 2 ? a * a + b * b : e ? b * b : a * a;
              m2 += inside(m, i) ? square : 0;
            }
          m2 = over_rows(m2);
          if (lane < 4) put(stage + 8 * (warp * UNITS + (8 * j + 2 * lane) / NEIGHBOURS + e), mean, m2);
        }
      if (lane == 0) put(stage + 8 * (4 * UNITS + warp), number, 0);
      together(wg);
      for (int unit = threadIdx.x % 128; unit < UNITS; unit += 128) {
        float mean = 0, m2 = 0, count = 0;
        for (int i = 0; i < 4; i++) {
          const u32 at = stage + 8 * (i * UNITS + unit);
          const float n = get(stage + 8 * (4 * UNITS + i)), both = count + n, delta = get(at) - mean;
          const float part = n / fmaxf(both, 1);
          m2 += get(at + 4) + delta * delta * count * part;
          mean += delta * part;
          count = both;
        }
        const long long plane = (long long)s.frames * s.units * s.chunks;
        const long long row = (long long)place.frame * s.units + place.n0 / NEIGHBOURS + unit;
        float* to = partials + row * s.chunks + o0 / ROWS * PHASES + place.phase;
        to[0] = mean; to[plane] = m2; to[2 * plane] = count;
      }
#endif
      #pragma unroll
      for (int m = 0; m < BLOCKS; m++)
        #pragma unroll
        for (int h = 0; h < N / CHUNK; h++) {
          if (threadIdx.x % 128 == 0) read_out();
          together(wg);
          #pragma unroll
          for (int j = 0; j < CHUNK / 8; j += 2) {
            u32 word[4];
            #pragma unroll
            for (int i = 0; i < 4; i++) {
              const float* two = &d[m][4 * (h * (CHUNK / 8) + j + i / 2) + 2 * (i % 2)];
              word[i] = pack<BRAIN>(two[0], two[1]) & inside(m, i % 2);
            }
            const u32 to = stage + j / 4 * 4096 + (j & 2 ? swizzled ^ 32 : swizzled);
            asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
              :: "r"(to), "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3]) : "memory");
          }
#if KIND == UPSAMPLE
          // Each row goes to a pixel of its own: beside it the border, zeros of a pixel or a row further on.
          together(wg);
          constexpr int PIECES = CHUNK / 8;
          const int wide = 2 * s.W + 2;
          #pragma unroll 1
          for (int i = threadIdx.x % 128; i < 64 * PIECES; i += 128) {
            const int line = i / PIECES, piece = i % PIECES, r = o0 + m % SUM * 64 + line;
            const int y = r / s.ROW, v = r % s.ROW;
            u32 w0, w1, w2, w3;
            asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(w0), "=r"(w1), "=r"(w2), "=r"(w3)
              : "r"(stage + piece / 4 * 4096 + line * 64 + ((piece % 4 ^ (line >> 1 & 3)) << 4)) : "memory");
            const int above = place.frame * (2 * s.H + 1) + 2 * y + place.phase + 1;
            const long long pixel = (long long)above * wide + 2 * v + m / SUM + 1;
            if (y + place.phase <= s.H && v <= s.W)
              pixels[(pixel * s.O + place.n0 + h * CHUNK) / 8 + piece] = {w0, w1, w2, w3};
          }
#else
          seen_by_copies();
          together(wg);
          if (threadIdx.x % 128 == 0) {
            #pragma unroll
            for (int c = 0; c < CHUNK / 32; c++) {
              const int column = place.n0 + h * CHUNK + c * 32;
              if (KIND != LINES)
                store(&out, stage + c * 4096, column, o0 + m % SUM * 64, AT_ONCE * place.frame + m / SUM);
              else if (begin.line < s.H)
                store(&out, stage + c * 4096, column, begin.column + m % SUM * 64,
                      place.frame * (2 * s.H + 1) + 2 * begin.line + m / SUM);
            }
            commit();
          }
#endif
        }
    }
    if (threadIdx.x % 128 == 0) written_out();
  }
}
