// C = X [N, K] @ W [O, K]^T in tiles of BM rows x BN columns, with what follows it in the epilogue:
//   EPILOGUE 0  q/k/v: bias, rotary positions, keys and values to their places; BN is a head
//   EPILOGUE 1  added to the residual stream (fp32); out = that x the next norm's weight, not yet
//               divided by the rows' rms, and parts of the rows' sums of squares
//   EPILOGUE 2  SiLU(gate) * up: a tile has BN columns of both; W holds gate's O rows, then up's
// num_real: tokens from there on are padding, whose tiles end at once; null: there is none.
// PARTS > 0: X is such an `out`; its rows' squares come in PARTS parts.
// SPLITS blocks of a cluster (EPILOGUE 1) share the sum over K and each ends a share of the rows.
// One thread fetches; each of BM / 64 warpgroups multiplies 64 rows (`multiply`). BLOCKS fit a
// multiprocessor.

constexpr int CONSUMERS = BM / 64;
constexpr int BK = 64;  // 128 bytes: a row of a swizzled tile
constexpr int W_ROWS = EPILOGUE == 2 ? 2 * BN : BN;
constexpr int X_BYTES = BM * BK * 2, W_BYTES = W_ROWS * BK * 2;
constexpr int STAGE_BYTES = X_BYTES + W_BYTES;
constexpr int BLOCKS_OF_K = K / BK;
// rows of a tile that a block ends, and their sums as another block of the cluster sends them
constexpr int ROWS = BM / SPLITS, SLICE_BYTES = ROWS * BN * 4;
static_assert(K % BK == 0 && BN % 32 == 0 && BLOCKS_OF_K >= SPLITS, "tile");

extern "C" __global__ void __launch_bounds__(128 * (CONSUMERS + 1), BLOCKS)
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
    const int group = threadIdx.x / 128;  // 0 fetches
    const int row_tile = blockIdx.x, column_tile = blockIdx.y, split = blockIdx.z;
    const int begin = split * BLOCKS_OF_K / SPLITS;
    const int count = (split + 1) * BLOCKS_OF_K / SPLITS - begin;

    if (num_real && row_tile * BM >= *num_real) return;  // padding: so is all of the cluster
    if (threadIdx.x == 0) {
        prefetch_map(&x_map);
        prefetch_map(&w_map);
        for (int s = 0; s < STAGES; s++) {
            barrier_init(full + 8 * s, 1);
            barrier_init(empty + 8 * s, CONSUMERS);
        }
        if (SPLITS > 1) {
            barrier_init(exchanged, 1);
            barrier_expect(exchanged, (SPLITS - 1) * SLICE_BYTES);
        }
        barrier_init_fence();
    }
    __syncthreads();
    if (SPLITS > 1) cluster_arrive_relaxed();

    if (group == 0) {
        if (BLOCKS == 1 && CONSUMERS == 2) fewer_registers<56>();
        if (threadIdx.x == 0) {
            auto load_w = [&](int block) {
                const u32 stage = tiles + block % STAGES * STAGE_BYTES + X_BYTES;
                const u32 barrier = full + 8 * (block % STAGES);
                const int column = (begin + block) * BK;
                barrier_expect(barrier, STAGE_BYTES);
                load_box_once(stage, &w_map, barrier, column, column_tile * BN);
                if (EPILOGUE == 2)
                    load_box_once(stage + BN * 128, &w_map, barrier, column, OUTPUTS + column_tile * BN);
            };
            auto load_x = [&](int block) {
                load_box(tiles + block % STAGES * STAGE_BYTES, &x_map, full + 8 * (block % STAGES),
                         (begin + block) * BK, row_tile * BM);
            };
            const int early = count < STAGES ? count : STAGES;
            for (int block = 0; block < early; block++) load_w(block);  // weights wait for nobody
            wait_for_previous();
            for (int block = 0; block < early; block++) load_x(block);
            for (int block = early; block < count; block++) {
                barrier_wait(empty + 8 * (block % STAGES), (block / STAGES - 1) & 1);
                load_w(block);
                load_x(block);
            }
        }
        if (SPLITS > 1) {
            __syncwarp();
            cluster_wait();
        }
    } else {
        if (BLOCKS == 1 && CONSUMERS == 2) more_registers<224>();
        const int thread = threadIdx.x % 128, lane = thread % 32, t = lane & 3;
        const int tile_row = (group - 1) * 64 + thread / 32 * 16 + lane / 4;
        [[maybe_unused]] const int row = row_tile * BM + tile_row;
        wait_for_previous();
        if (threadIdx.x == 128) launch_next();
        // what the epilogue needs is read before the products, so that nobody waits for it
#if PARTS > 0
        float part_of_square[2][(PARTS + 3) / 4];
#endif
#if EPILOGUE == 0
        constexpr int HALF = BN / 16;  // blocks of 8 columns
        // a lane reads a whole block of 8 columns; `deal_block` deals them out
        uint4 all_cos[2][HALF / 4], all_sin[2][HALF / 4];
        u32 biases[2 * HALF];
        long long place[2];
        const int head = column_tile;
#elif EPILOGUE == 1
        const bool is_mine = tile_row / ROWS == split;  // this warp ends its rows
        float2 before[2][BN / 8];
        u32 weights[BN / 8];
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
            for (int quad = 0; quad < HALF / 4; quad++) {
                all_cos[i][quad] = ((const uint4*)cos)[own * (BN / 8) + 4 * quad + t];
                all_sin[i][quad] = ((const uint4*)sin)[own * (BN / 8) + 4 * quad + t];
            }
        }
#pragma unroll
        for (int j = 0; j < 2 * HALF; j++)
            biases[j] = HAS_BIAS ? bias[head * (BN / 2) + 4 * j + t] : 0;
#elif EPILOGUE == 1
        if (is_mine) {
#pragma unroll
            for (int j = 0; j < BN / 8; j++) {
                const int column = column_tile * BN + 8 * j + 2 * t;
                weights[j] = *(const u32*)(norm + column);
#pragma unroll
                for (int i = 0; i < 2; i++)
                    if (row + 8 * i < num_tokens)
                        before[i][j] = *(const float2*)(
                            residual + (long long)(row + 8 * i) * OUTPUTS + column);
            }
        }
#endif
        float acc[BN / 2];
#if EPILOGUE == 2
        float up[BN / 2];
#endif
        const u32 first = tiles + (group - 1) * 64 * 128;
        for (int block = 0; block < count; block++) {
            const int s = block % STAGES;
            barrier_wait(full + 8 * s, block / STAGES & 1);
            const u64 x = describe(first + s * STAGE_BYTES);
            const u64 w = describe(tiles + s * STAGE_BYTES + X_BYTES);
            wgmma_fence();
#pragma unroll
            for (int i = 0; i < 4; i++) {
                multiply(acc, x + 2 * i, w + 2 * i, block | i);
#if EPILOGUE == 2
                multiply(up, x + 2 * i, w + BN * 8 + 2 * i, block | i);
#endif
            }
            wgmma_commit();
            if (block > 0) {
                wgmma_wait<1>();
                if (thread == 0) barrier_arrive(empty + 8 * ((block - 1) % STAGES));
            }
        }
        wgmma_wait<0>();
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
        // each block of the cluster ends ROWS rows; the threads that hold the others' sums send them
        // to the threads that hold the same columns there
        if (SPLITS > 1) cluster_wait();  // all have begun
        constexpr int CHUNK = ROWS / 16 * 32 * 16;  // bytes of one float4 of each thread
        const u32 slot = (tile_row % ROWS / 16 * 32 + lane) * 16;
        if (!is_mine) {
            const u32 to = tile_row / ROWS;
            const u32 source = split < to ? split : split - 1;
            const u32 there = address_at(exchange + source * SLICE_BYTES + slot, to);
            const u32 barrier = address_at(exchanged, to);
#pragma unroll
            for (int j = 0; j < BN / 8; j++)
                send(there + j * CHUNK, barrier, acc[4 * j], acc[4 * j + 1], acc[4 * j + 2],
                     acc[4 * j + 3]);
        } else {
            if (SPLITS > 1) barrier_wait(exchanged, 0);
#pragma unroll
            for (int source = 0; source < SPLITS - 1; source++)
#pragma unroll
                for (int j = 0; j < BN / 8; j++) {
                    const float4 more = load_shared(exchange + source * SLICE_BYTES + slot + j * CHUNK);
                    acc[4 * j] += more.x, acc[4 * j + 1] += more.y;
                    acc[4 * j + 2] += more.z, acc[4 * j + 3] += more.w;
                }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const bool inside = row + 8 * i < num_tokens;
                const long long at = (long long)(row + 8 * i) * OUTPUTS + column_tile * BN;
                float total = 0.0f;
                u32 both[BN / 8];
#pragma unroll
                for (int j = 0; j < BN / 8; j++) {
                    const float a = before[i][j].x + acc[4 * j + 2 * i];
                    const float b = before[i][j].y + acc[4 * j + 2 * i + 1];
                    total += a * a + b * b;
                    both[j] = pack_bf16(a * low_bf16(weights[j]), b * high_bf16(weights[j]));
                    if (inside) *(float2*)(residual + at + 8 * j + 2 * t) = make_float2(a, b);
                }
                total += __shfl_xor_sync(0xFFFFFFFFu, total, 1);
                total += __shfl_xor_sync(0xFFFFFFFFu, total, 2);
                if (inside && t == 0) out_squares[column_tile * num_tokens + row + 8 * i] = total;
#pragma unroll
                for (int quad = 0; quad < BN / 32; quad++) {
                    const uint4 all = gather_block(both[4 * quad], both[4 * quad + 1],
                                                   both[4 * quad + 2], both[4 * quad + 3]);
                    if (inside) *(uint4*)(out + at + 32 * quad + 8 * t) = all;
                }
            }
        }
#else
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const bool inside = row + 8 * i < num_tokens;
#if EPILOGUE == 2
#pragma unroll
            for (int quad = 0; quad < BN / 32; quad++) {
                u32 block[4];
#pragma unroll
                for (int j = 0; j < 4; j += 2) {
                    // g / (1 + exp(-g)) * u = (1 + tanh(g / 2)) * g u / 2
                    float y[4];
#pragma unroll
                    for (int n = 0; n < 4; n++) {
                        const int at = 4 * (4 * quad + j + n / 2) + 2 * i + n % 2;
                        const float half = acc[at] * up[at] * (0.5f * scale[i] * scale[i]);
                        y[n] = half * tanh_fast(acc[at] * (0.5f * scale[i])) + half;
                    }
                    block[j] = pack_bf16(y[0], y[1]);
                    block[j + 1] = pack_bf16(y[2], y[3]);
                }
                const uint4 all = gather_block(block[0], block[1], block[2], block[3]);
                const int column = column_tile * BN + 32 * quad + 8 * t;
                if (inside && column < OUTPUTS)
                    *(uint4*)(out + (long long)(row + 8 * i) * OUTPUTS + column) = all;
            }
#else
            u32 both[2 * HALF];
#pragma unroll
            for (int j = 0; j < 2 * HALF; j++)
                both[j] = pack_bf16(acc[4 * j + 2 * i] * scale[i] + low_bf16(biases[j]),
                                    acc[4 * j + 2 * i + 1] * scale[i] + high_bf16(biases[j]));
            if (head < HQ + HKV) {
                u32 turn_cos[HALF], turn_sin[HALF];
#pragma unroll
                for (int quad = 0; quad < HALF / 4; quad++) {
                    deal_block(all_cos[i][quad], turn_cos + 4 * quad);
                    deal_block(all_sin[i][quad], turn_sin + 4 * quad);
                }
#pragma unroll
                for (int j = 0; j < HALF; j++) {
                    const float a0 = low_bf16(both[j]), a1 = high_bf16(both[j]);
                    const float b0 = low_bf16(both[j + HALF]), b1 = high_bf16(both[j + HALF]);
                    const float c0 = low_bf16(turn_cos[j]), c1 = high_bf16(turn_cos[j]);
                    const float s0 = low_bf16(turn_sin[j]), s1 = high_bf16(turn_sin[j]);
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
