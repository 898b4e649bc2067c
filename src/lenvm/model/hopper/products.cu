// C = X [N, K] @ W [O, K]^T in tiles of BM rows x BN columns, with what follows it in the epilogue:
//   EPILOGUE 0  q/k/v: bias, rotary positions, keys and values to their places; BN is a head
//   EPILOGUE 1  added to the residual stream (fp32); out = that x the next norm's weight, not yet
//               divided by the rows' rms, and parts of the rows' sums of squares
//   EPILOGUE 2  SiLU(gate) * up: a tile has BN columns of both; W holds gate's O rows, then up's
// PARTS > 0: X is such an `out`; its rows' squares come in PARTS parts.
// SPLITS blocks of a cluster (EPILOGUE 1) share the sum over K and each ends a share of the rows.
// One thread fetches; each of BM / 64 warpgroups multiplies 64 rows. BLOCKS fit a multiprocessor.
// NEXT_EARLY: the next kernel's blocks may come from the start, else when this one multiplies no
// more.

constexpr int CONSUMERS = BM / 64;
constexpr int BK = 64;  // 128 bytes: a row of a swizzled tile
constexpr int W_ROWS = EPILOGUE == 2 ? 2 * BN : BN;
constexpr int X_BYTES = BM * BK * 2, W_BYTES = W_ROWS * BK * 2;
constexpr int STAGE_BYTES = X_BYTES + W_BYTES;
constexpr int BLOCKS_OF_K = K / BK;
static_assert(K % BK == 0 && BN % 32 == 0 && BLOCKS_OF_K >= SPLITS, "tile");

struct Around {
    const u32* before;  // counter of the kernel before, or null: wait until it is over
    u32 num_before;
    u32* done;  // this one's counter
    const u8* next[2];  // what the next kernels will read, for the L2 cache
    u32 next_bytes[2];
};

DEVICE void wait_for_input(const Around& around) {
    if (around.before)
        wait_for_count(around.before, around.num_before);
    else
        wait_for_previous();
}

extern "C" __global__ void __launch_bounds__(128 * (CONSUMERS + 1), BLOCKS)
run(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map,
    const __grid_constant__ Around around, int num_tokens, const float* squares, float eps,
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
    __shared__ u64 barriers[2 * STAGES];
    const u32 full = shared_address(barriers), empty = full + 8 * STAGES;
    const int group = threadIdx.x / 128;  // 0 fetches
    const int row_tile = blockIdx.x, column_tile = blockIdx.y, split = blockIdx.z;
    const int begin = split * BLOCKS_OF_K / SPLITS;
    const int count = (split + 1) * BLOCKS_OF_K / SPLITS - begin;

    if (threadIdx.x == 0) {
        prefetch_map(&x_map);
        prefetch_map(&w_map);
        for (int s = 0; s < STAGES; s++) {
            barrier_init(full + 8 * s, 1);
            barrier_init(empty + 8 * s, CONSUMERS);
        }
        barrier_init_fence();
    }
    __syncthreads();

    if (group == 0) {
        if (BLOCKS == 1 && CONSUMERS == 2) fewer_registers<40>();
        if (threadIdx.x == 0) {
            auto load_w = [&](int block) {
                const u32 stage = tiles + block % STAGES * STAGE_BYTES + X_BYTES;
                const u32 barrier = full + 8 * (block % STAGES);
                const int column = (begin + block) * BK;
                barrier_expect(barrier, STAGE_BYTES);
                load_box(stage, &w_map, barrier, column, column_tile * BN);
                if (EPILOGUE == 2)
                    load_box(stage + BN * 128, &w_map, barrier, column, OUTPUTS + column_tile * BN);
            };
            auto load_x = [&](int block) {
                load_box(tiles + block % STAGES * STAGE_BYTES, &x_map, full + 8 * (block % STAGES),
                         (begin + block) * BK, row_tile * BM);
            };
            const int early = count < STAGES ? count : STAGES;
            for (int block = 0; block < early; block++) load_w(block);  // weights wait for nobody
            wait_for_input(around);
            fence_async_global();
            for (int block = 0; block < early; block++) load_x(block);
            for (int block = early; block < count; block++) {
                barrier_wait(empty + 8 * (block % STAGES), (block / STAGES - 1) & 1);
                load_w(block);
                load_x(block);
            }
        } else if (threadIdx.x == 32) {
            const u32 blocks = gridDim.x * gridDim.y * gridDim.z;
            const u32 own = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
            for (int i = 0; i < 2; i++) {
                const u32 pieces = around.next_bytes[i] / 4096;
                for (u32 piece = own; piece < pieces; piece += blocks)
                    prefetch(around.next[i] + piece * 4096ull, 4096);
            }
        }
        if (EPILOGUE == 1 && SPLITS > 1) {
            __syncwarp();
            cluster_arrive();
            cluster_wait();
        }
    } else {
        if (BLOCKS == 1 && CONSUMERS == 2) more_registers<232>();
        const int thread = threadIdx.x % 128, lane = thread % 32, t = lane & 3;
        const int tile_row = (group - 1) * 64 + thread / 32 * 16 + lane / 4;
        [[maybe_unused]] const int row = row_tile * BM + tile_row;
        if (thread == 0) wait_for_input(around);
        meet(group, 128);
        if (NEXT_EARLY && threadIdx.x == 128) launch_next();
        // what the epilogue needs is read here, so that nobody waits for it there
#if PARTS > 0
        float square[2] = {0.0f, 0.0f};
        float part_of_square[2][(PARTS + 3) / 4];
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int j = 0; j < (PARTS + 3) / 4; j++)
                part_of_square[i][j] = t + 4 * j < PARTS && row + 8 * i < num_tokens
                                           ? squares[(t + 4 * j) * num_tokens + row + 8 * i]
                                           : 0.0f;
#endif
#if EPILOGUE == 0
        constexpr int HALF = BN / 16;  // blocks of 8 columns
        u32 turn_cos[2][HALF], turn_sin[2][HALF], biases[2 * HALF];
        long long place[2];
        const int head = column_tile;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int own = row + 8 * i < num_tokens ? row + 8 * i : num_tokens - 1;
            place[i] = index[own];
#pragma unroll
            for (int j = 0; j < HALF; j++) {
                turn_cos[i][j] = cos[own * (BN / 2) + 4 * j + t];
                turn_sin[i][j] = sin[own * (BN / 2) + 4 * j + t];
            }
        }
#pragma unroll
        for (int j = 0; j < 2 * HALF; j++)
            biases[j] = HAS_BIAS ? bias[head * (BN / 2) + 4 * j + t] : 0;
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
                WGMMA(acc, x + 2 * i, w + 2 * i, block | i);
#if EPILOGUE == 2
                WGMMA(up, x + 2 * i, w + BN * 8 + 2 * i, block | i);
#endif
            }
            wgmma_commit();
            if (block > 0) {
                wgmma_wait<1>();
                if (thread == 0) barrier_arrive(empty + 8 * ((block - 1) % STAGES));
            }
        }
        wgmma_wait<0>();
        if (!NEXT_EARLY && threadIdx.x == 128) launch_next();
        [[maybe_unused]] float scale[2] = {1.0f, 1.0f};
#if PARTS > 0
#pragma unroll
        for (int i = 0; i < 2; i++) {
#pragma unroll
            for (int j = 0; j < (PARTS + 3) / 4; j++) square[i] += part_of_square[i][j];
            square[i] += __shfl_xor_sync(0xFFFFFFFFu, square[i], 1);
            square[i] += __shfl_xor_sync(0xFFFFFFFFu, square[i], 2);
            scale[i] = rsqrtf(square[i] / K + eps);
        }
#endif
#if EPILOGUE == 1
        // each block of the cluster ends ROWS rows: the sums go to it, then from shared memory out
        constexpr int ROWS = BM / SPLITS, PITCH = BN + 8;
        constexpr int THREADS = 128 * CONSUMERS, PER_ROW = THREADS / ROWS;
        constexpr int PIECES = BN / 4 / PER_ROW;  // of four columns
        const int own = threadIdx.x - 128, own_row = own / PER_ROW, own_part = own % PER_ROW;
        const int end_row = row_tile * BM + split * ROWS + own_row;
        const bool inside = end_row < num_tokens;
        const long long at = (long long)end_row * OUTPUTS + column_tile * BN;
        const u32 exchange = tiles + STAGES * STAGE_BYTES;
        float4 sum[PIECES];
#pragma unroll
        for (int p = 0; p < PIECES; p++)
            sum[p] = inside ? __ldcg((const float4*)(residual + at) + own_part + p * PER_ROW)
                            : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        u32 there = exchange + ((split * ROWS + tile_row % ROWS) * PITCH + 2 * t) * 4;
        if (SPLITS > 1) there = shared_of_block(there, tile_row / ROWS);
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int j = 0; j < BN / 8; j++)
                store_to_block(there + (8 * i * PITCH + 8 * j) * 4, acc[4 * j + 2 * i],
                               acc[4 * j + 2 * i + 1]);
        if (SPLITS > 1) {
            cluster_arrive();
            cluster_wait();
        } else {
            meet(3, THREADS);
        }
        float total = 0.0f;
#pragma unroll
        for (int p = 0; p < PIECES; p++) {
            const int column = 4 * (own_part + p * PER_ROW);
#pragma unroll
            for (int s = 0; s < SPLITS; s++) {
                const float4 more =
                    load_shared(exchange + ((s * ROWS + own_row) * PITCH + column) * 4);
                sum[p].x += more.x, sum[p].y += more.y, sum[p].z += more.z, sum[p].w += more.w;
            }
            total += sum[p].x * sum[p].x + sum[p].y * sum[p].y + sum[p].z * sum[p].z +
                     sum[p].w * sum[p].w;
            const uint2 weight = *(const uint2*)(norm + column_tile * BN + column);
            if (inside) {
                *(float4*)(residual + at + column) = sum[p];
                *(uint2*)(out + at + column) = make_uint2(
                    pack_bf16(sum[p].x * low_bf16(weight.x), sum[p].y * high_bf16(weight.x)),
                    pack_bf16(sum[p].z * low_bf16(weight.y), sum[p].w * high_bf16(weight.y)));
            }
        }
#pragma unroll
        for (int other = PER_ROW / 2; other > 0; other /= 2)
            total += __shfl_xor_sync(0xFFFFFFFFu, total, other);
        if (inside && own_part == 0) out_squares[column_tile * num_tokens + end_row] = total;
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
                    // x / (1 + exp(-x)); one division for four, which is not even slightly wrong:
                    // where exp is cut off, at 2^30, the result is below 1e-7
                    float g[4], e[4];
#pragma unroll
                    for (int n = 0; n < 4; n++) {
                        const int at = 4 * (4 * quad + j + n / 2) + 2 * i + n % 2;
                        g[n] = acc[at] * scale[i];
                        e[n] = 1.0f + exp2_fast(fminf(g[n] * -1.44269504f, 30.0f));
                    }
                    const float ab = e[0] * e[1], cd = e[2] * e[3];
                    const float one = __fdividef(1.0f, ab * cd);
                    const float over_ab = one * cd, over_cd = one * ab;
                    const int at = 4 * (4 * quad + j) + 2 * i;
                    block[j] = pack_bf16(g[0] * (over_ab * e[1]) * (up[at] * scale[i]),
                                         g[1] * (over_ab * e[0]) * (up[at + 1] * scale[i]));
                    block[j + 1] = pack_bf16(g[2] * (over_cd * e[3]) * (up[at + 4] * scale[i]),
                                             g[3] * (over_cd * e[2]) * (up[at + 5] * scale[i]));
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
        if (around.done) {
            meet(3, 128 * CONSUMERS);
            if (threadIdx.x == 128) add_to_count(around.done);
        }
    }
}
