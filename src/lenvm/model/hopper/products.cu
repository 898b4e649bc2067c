// C = X [N, K] @ W [O, K]^T in tiles of BM rows x BN columns, with what follows it in the epilogue:
//   EPILOGUE 0  q/k/v: bias, rotary positions, keys and values to their places; BN is a head
//   EPILOGUE 1  added to the residual stream (fp32); out = that x the next norm's weight, not yet
//               divided by the rows' rms, and parts of the rows' sums of squares
//   EPILOGUE 2  SiLU(gate) * up: a tile has BN columns of both; W holds gate's O rows, then up's
// num_real: tokens from there on are padding, whose tiles end at once; null: there is none.
// PARTS > 0: X is such an `out`; its rows' squares come in PARTS parts.
// SPLITS blocks of a cluster (EPILOGUE 1) share the sum over K and each ends a share of the rows.
// SHARES blocks of it have the same columns of neighbouring row tiles: each fetches a part of the
// weights for all of them.
// EARLY tiles of weights are asked for before the kernel before has ended: where all blocks read
// several MB of memory at once, the first tiles come sooner if the others wait.
// One thread fetches; each of BM / 64 warpgroups multiplies 64 rows (`multiply`). BLOCKS fit a
// multiprocessor.

constexpr int CONSUMERS = BM / 64;
// Four warps fetch where they can give registers away, else one.
constexpr int THREADS = 128 * CONSUMERS + (CONSUMERS == 2 ? 128 : 32);
constexpr int BK = 64;  // 128 bytes: a row of a swizzled tile
constexpr int W_ROWS = EPILOGUE == 2 ? 2 * BN : BN;
constexpr int CLUSTER = SPLITS * SHARES;
constexpr int COLUMNS = W_ROWS <= 256 ? W_ROWS : BN;  // of a wgmma
constexpr int X_BYTES = BM * BK * 2, W_BYTES = W_ROWS * BK * 2;
constexpr int STAGE_BYTES = X_BYTES + W_BYTES;
constexpr int BLOCKS_OF_K = K / BK;
// rows of a tile that a block ends, and their sums as another block of the cluster sends them
constexpr int ROWS = BM / SPLITS, SLICE_BYTES = ROWS * BN * 4;
// a warp ends 16 rows x 32 columns at a time
constexpr int QUADS = BN / 32, ITEMS = ROWS / 16 * QUADS, WARPS = 4 * CONSUMERS;
constexpr int STEPS = (ITEMS + WARPS - 1) / WARPS;
static_assert(BN / SHARES % 8 == 0, "swizzled in groups of 8 rows");
static_assert(K % BK == 0 && BN % 32 == 0 && BLOCKS_OF_K >= SPLITS, "tile");

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
run(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map,
    int num_tokens, const int* num_real, const float* squares, float eps,
#if EPILOGUE == 0
    const u32* bias, const u32* cos, const u32* sin, u16* q, u16* k, u16* v, const long long* index
#elif EPILOGUE == 1
    float* residual, const u16* norm, u16* out, float* out_squares
#else
    u16* out
#endif
) {
    extern __shared__ u8 memory[];
    const u32 tiles = (shared_address(memory) + 1023) & ~1023u;
    __shared__ u64 barriers[2 * STAGES + 1];
    const u32 full = shared_address(barriers), empty = full + 8 * STAGES;
    [[maybe_unused]] const u32 exchanged = empty + 8 * STAGES;
    [[maybe_unused]] const u32 exchange = tiles + STAGES * STAGE_BYTES;
    const int group = threadIdx.x / 128;  // the last fetches
    const int row_tile = blockIdx.x, column_tile = blockIdx.y, split = blockIdx.z;
    [[maybe_unused]] const int share = row_tile % SHARES;  // of the cluster: SHARES * split + share
    const int begin = split * BLOCKS_OF_K / SPLITS;
    const int count = (split + 1) * BLOCKS_OF_K / SPLITS - begin;

    // padding: so is all of the cluster
    if (num_real && row_tile / SHARES * SHARES * BM >= *num_real) return;
    if (threadIdx.x == 0) {
        prefetch_map(&x_map);
        prefetch_map(&w_map);
        for (int s = 0; s < STAGES; s++) {
            barrier_init(full + 8 * s, 1);
            barrier_init(empty + 8 * s, CONSUMERS * SHARES);
        }
        if (SPLITS > 1) {
            barrier_init(exchanged, 1);
            barrier_expect(exchanged, (SPLITS - 1) * SLICE_BYTES);
        }
        barrier_init_fence();
    }
    __syncthreads();
    if (CLUSTER > 1) cluster_arrive_relaxed();

    if (group == CONSUMERS) {
        if (THREADS == 384) fewer_registers<56>();
        if (SHARES > 1) cluster_wait();  // all have made their barriers
        if (threadIdx.x % 128 == 0) {
            auto load_w = [&](int block) {
                const u32 stage = tiles + block % STAGES * STAGE_BYTES + X_BYTES;
                const u32 barrier = full + 8 * (block % STAGES);
                const int column = (begin + block) * BK;
                barrier_expect(barrier, STAGE_BYTES);
                const auto load = [&](u32 to, int row) {
                    if (SHARES == 1)
                        load_box_once(to, &w_map, barrier, column, row);
                    else
                        load_box_for_all(to + share * (BN / SHARES) * 128, &w_map, barrier, column,
                                         row + share * (BN / SHARES),
                                         ((1 << SHARES) - 1) << SHARES * split);
                };
                load(stage, column_tile * BN);
                if (EPILOGUE == 2) load(stage + BN * 128, OUTPUTS + column_tile * BN);
            };
            auto load_x = [&](int block) {
                load_box(tiles + block % STAGES * STAGE_BYTES, &x_map, full + 8 * (block % STAGES),
                         (begin + block) * BK, row_tile * BM);
            };
            const int early = count < EARLY ? count : EARLY;
            for (int block = 0; block < early; block++) load_w(block);  // weights wait for nobody
            wait_for_previous();
            for (int block = 0; block < early; block++) load_x(block);
            for (int block = early; block < count; block++) {
                if (block >= STAGES)
                    barrier_wait(empty + 8 * (block % STAGES), (block / STAGES - 1) & 1);
                load_w(block);
                load_x(block);
            }
        }
        if (CLUSTER > 1 && SHARES == 1) {
            __syncwarp();
            cluster_wait();
        }
    } else {
        if (THREADS == 384) more_registers<224>();
        const int thread = threadIdx.x % 128, lane = thread % 32, t = lane & 3;
        const int tile_row = group * 64 + thread / 32 * 16 + lane / 4;
        [[maybe_unused]] const int row = row_tile * BM + tile_row;
        if (SHARES > 1) cluster_wait();
        wait_for_previous();
        if (threadIdx.x == 0) launch_next();
        // what the epilogue needs is read before the products, so that nobody waits for it
#if PARTS > 0
        float part_of_square[2][(PARTS + 3) / 4];
#endif
#if EPILOGUE == 0
        constexpr int HALF = BN / 16;  // blocks of 8 columns
        u32 turn_cos[2][HALF], turn_sin[2][HALF];
        u32 biases[2 * HALF];
        long long place[2];
        const int head = column_tile;
#elif EPILOGUE == 1
        float2 before[STEPS][2][4];
        u32 weights[STEPS][4];
        // of what this warp ends: rows of this lane, columns of the quad, and whether there are such
        const auto row_of = [&](int step) {
            const int item = threadIdx.x / 32 + WARPS * step;
            return row_tile * BM + split * ROWS + item / QUADS * 16 + lane / 4;
        };
        const auto column_of = [&](int step) {
            return column_tile * BN + (threadIdx.x / 32 + WARPS * step) % QUADS * 32;
        };
        const auto is_item = [&](int step) {
            return ITEMS % WARPS == 0 || threadIdx.x / 32 + WARPS * step < ITEMS;
        };
#endif
#if PARTS > 0
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int j = 0; j < (PARTS + 3) / 4; j++)
                part_of_square[i][j] = t + 4 * j < PARTS && row + 8 * i < num_tokens
                                           ? squares[(t + 4 * j) * num_tokens + row + 8 * i]
                                           : 0.0f;
#endif
#if EPILOGUE == 0
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int own = row + 8 * i < num_tokens ? row + 8 * i : num_tokens - 1;
            place[i] = index[own];
#pragma unroll
            for (int quad = 0; quad < HALF / 4; quad++) {  // a lane reads a block of 8 columns
                const int at = own * (BN / 8) + 4 * quad + t;
                deal_block(((const uint4*)cos)[at], turn_cos[i] + 4 * quad);
                deal_block(((const uint4*)sin)[at], turn_sin[i] + 4 * quad);
            }
        }
#pragma unroll
        for (int j = 0; j < 2 * HALF; j++)
            biases[j] = HAS_BIAS ? bias[head * (BN / 2) + 4 * j + t] : 0;
#elif EPILOGUE == 1
#pragma unroll
        for (int step = 0; step < STEPS; step++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                if (!is_item(step)) continue;
                const int column = column_of(step) + 8 * j + 2 * t;
                weights[step][j] = *(const u32*)(norm + column);
#pragma unroll
                for (int i = 0; i < 2; i++)
                    if (row_of(step) + 8 * i < num_tokens)
                        before[step][i][j] = *(const float2*)(
                            residual + (long long)(row_of(step) + 8 * i) * OUTPUTS + column);
            }
#endif
        float acc[W_ROWS / 2];  // gate's, then up's
        const u32 described_x = describe(tiles + group * 64 * 128);
        const u32 described_w = describe(tiles + X_BYTES);
        int stage = 0, parity = 0;
        for (int block = 0; block < count; block++) {
            barrier_wait(full + 8 * stage, parity);
            const u32 x = described_x + stage * (STAGE_BYTES / 16);
            const u32 w = described_w + stage * (STAGE_BYTES / 16);
            wgmma_fence();
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int n = 0; n < W_ROWS; n += COLUMNS)
                    multiply(*(float(*)[COLUMNS / 2])(acc + n / 2), with_upper(x + 2 * i),
                             with_upper(w + n * 8 + 2 * i), block | i);
            wgmma_commit();
            if (block > 0) {
                wgmma_wait<1>();
                const u32 emptied = empty + 8 * (stage ? stage - 1 : STAGES - 1);
                if (SHARES == 1) {
                    if (thread == 0) barrier_arrive(emptied);
                } else if (thread < SHARES && block - 1 + STAGES < count) {  // else nobody waits,
                    // and a block may be over
                    barrier_arrive_at(address_at(emptied, SHARES * split + thread));
                }
            }
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }
        wgmma_wait<0>();
        settle(acc);
        [[maybe_unused]] float scale[2] = {1.0f, 1.0f};
#if PARTS > 0
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float square = 0.0f;
#pragma unroll
            for (int j = 0; j < (PARTS + 3) / 4; j++) square += part_of_square[i][j];
            square += __shfl_xor_sync(0xFFFFFFFFu, square, 1);
            square += __shfl_xor_sync(0xFFFFFFFFu, square, 2);
            scale[i] = rsqrtf(square / K + eps);
        }
#endif
#if EPILOGUE == 1
        // each block of the cluster ends ROWS rows, whose sums all send there: [source][16 rows]
        // [8 columns][lane], as wgmma leaves them
        __shared__ float row_squares[QUADS][ROWS];
        if (SPLITS > 1 && SHARES == 1) cluster_wait();  // all have begun
        const u32 to = tile_row / ROWS;
        const u32 place =
            exchange + split * SLICE_BYTES + tile_row % ROWS / 16 * (BN / 8 * 512) + lane * 16;
        if (SPLITS == 1 || to == split) {
#pragma unroll
            for (int j = 0; j < BN / 8; j++)
                store4(place + j * 512,
                       make_uint4(__float_as_uint(acc[4 * j]), __float_as_uint(acc[4 * j + 1]),
                                  __float_as_uint(acc[4 * j + 2]), __float_as_uint(acc[4 * j + 3])));
        } else {
            const u32 other = SHARES * to + share;
            const u32 there = address_at(place, other), barrier = address_at(exchanged, other);
#pragma unroll
            for (int j = 0; j < BN / 8; j++)
                send(there + j * 512, barrier, acc[4 * j], acc[4 * j + 1], acc[4 * j + 2],
                     acc[4 * j + 3]);
        }
        meet(1, 32 * WARPS);
        if (SPLITS > 1) barrier_wait(exchanged, 0);
        // each kind of work for all of it at once: none waits for another's results
        float sums[STEPS][4][4] = {}, totals[STEPS][2];
        u32 both[STEPS][2][4];
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            if (!is_item(step)) continue;
            const int item = threadIdx.x / 32 + WARPS * step;
            const u32 from =
                exchange + (item / QUADS * (BN / 8) + item % QUADS * 4) * 512 + lane * 16;
#pragma unroll
            for (int source = 0; source < SPLITS; source++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float4 more = load_shared(from + source * SLICE_BYTES + j * 512);
                    sums[step][j][0] += more.x, sums[step][j][1] += more.y;
                    sums[step][j][2] += more.z, sums[step][j][3] += more.w;
                }
        }
#pragma unroll
        for (int step = 0; step < STEPS; step++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                totals[step][i] = 0;
                const bool inside = is_item(step) && row_of(step) + 8 * i < num_tokens;
                float* const to =
                    residual + (long long)(row_of(step) + 8 * i) * OUTPUTS + column_of(step);
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float a = before[step][i][j].x + sums[step][j][2 * i];
                    const float b = before[step][i][j].y + sums[step][j][2 * i + 1];
                    totals[step][i] += a * a + b * b;
                    both[step][i][j] = pack_bf16(a * low_bf16(weights[step][j]),
                                                 b * high_bf16(weights[step][j]));
                    if (inside) *(float2*)(to + 8 * j + 2 * t) = make_float2(a, b);
                }
            }
#pragma unroll
        for (int other = 1; other <= 2; other *= 2)
#pragma unroll
            for (int step = 0; step < STEPS; step++)
#pragma unroll
                for (int i = 0; i < 2; i++)
                    totals[step][i] += __shfl_xor_sync(0xFFFFFFFFu, totals[step][i], other);
#pragma unroll
        for (int step = 0; step < STEPS; step++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int item = threadIdx.x / 32 + WARPS * step, own = row_of(step) + 8 * i;
                if (is_item(step) && t == 0)
                    row_squares[item % QUADS][item / QUADS * 16 + lane / 4 + 8 * i] = totals[step][i];
                const uint4 all = gather_block(both[step][i][0], both[step][i][1],
                                               both[step][i][2], both[step][i][3]);
                if (is_item(step) && own < num_tokens)
                    *(uint4*)(out + (long long)own * OUTPUTS + column_of(step) + 8 * t) = all;
            }
        meet(1, 32 * WARPS);
        const int last = row_tile * BM + split * ROWS + threadIdx.x;
        if (threadIdx.x < ROWS && last < num_tokens) {
            float total = 0.0f;
#pragma unroll
            for (int quad = 0; quad < QUADS; quad++) total += row_squares[quad][threadIdx.x];
            out_squares[column_tile * num_tokens + last] = total;
        }
#else
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const bool inside = row + 8 * i < num_tokens;
#if EPILOGUE == 2
            u32 both[BN / 8];
#pragma unroll
            for (int j = 0; j < BN / 8; j++) {
                // g / (1 + exp(-g)) * u = (1 + tanh(g / 2)) * g u / 2
                float y[2];
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    const int at = 4 * j + 2 * i + n;
                    const float half = acc[at] * acc[BN / 2 + at] * (0.5f * scale[i] * scale[i]);
                    y[n] = half * tanh_fast(acc[at] * (0.5f * scale[i])) + half;
                }
                both[j] = pack_bf16(y[0], y[1]);
            }
            u16* const to = out + (long long)(row + 8 * i) * OUTPUTS;
#pragma unroll
            for (int quad = 0; quad < BN / 32; quad++) {
                const uint4 all = gather_block(both[4 * quad], both[4 * quad + 1],
                                               both[4 * quad + 2], both[4 * quad + 3]);
                const int column = column_tile * BN + 32 * quad + 8 * t;
                if (inside && column < OUTPUTS) *(uint4*)(to + column) = all;
            }
#else
            u32 both[2 * HALF];
#pragma unroll
            for (int j = 0; j < 2 * HALF; j++)
                both[j] = pack_bf16(acc[4 * j + 2 * i] * scale[i] + low_bf16(biases[j]),
                                    acc[4 * j + 2 * i + 1] * scale[i] + high_bf16(biases[j]));
            if (head < HQ + HKV) {
#pragma unroll
                for (int j = 0; j < HALF; j++) {
                    const float a0 = low_bf16(both[j]), a1 = high_bf16(both[j]);
                    const float b0 = low_bf16(both[j + HALF]), b1 = high_bf16(both[j + HALF]);
                    const float c0 = low_bf16(turn_cos[i][j]), c1 = high_bf16(turn_cos[i][j]);
                    const float s0 = low_bf16(turn_sin[i][j]), s1 = high_bf16(turn_sin[i][j]);
                    both[j] = pack_bf16(a0 * c0 - b0 * s0, a1 * c1 - b1 * s1);
                    both[j + HALF] = pack_bf16(b0 * c0 + a0 * s0, b1 * c1 + a1 * s1);
                }
            }
            u16* to = head < HQ ? q + ((long long)(row + 8 * i) * HQ + head) * BN
                      : head < HQ + HKV ? k + (place[i] * HKV + head - HQ) * BN
                                        : v + (place[i] * HKV + head - HQ - HKV) * BN;
#pragma unroll
            for (int quad = 0; quad < BN / 32; quad++) {
                const uint4 all = gather_block(both[4 * quad], both[4 * quad + 1],
                                               both[4 * quad + 2], both[4 * quad + 3]);
                if (inside) *(uint4*)(to + 32 * quad + 8 * t) = all;
            }
#endif
        }
#endif
    }
}
