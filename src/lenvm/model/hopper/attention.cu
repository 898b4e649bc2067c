// Attention of candidates over their request's prefix, page by page, and themselves.
//
// Definitions: D (head size: 64 or 128), G (query heads of a key head), HKV, STAGES (pages on their
// way), SPLITS (blocks of a cluster), HALVES (of a block: 1 or 2), ROWS (128), HAS_WINDOW,
// OWN_IS_TOKEN; multiply_keys for 8, 16, 24, 32 and 64 columns, multiply_values for the first four,
// multiply_weights for 64.
//
// A cluster serves a unit of `plan.cu`: up to ROWS query rows of one request and key head. Its
// blocks' halves of 256 threads take pages in turn. Two groups of 128 of them compute, each half of
// the rows; their first warp brings further pages: one that does nothing else would take registers
// from the others. What all found is merged in shared memory across the cluster, always in the same
// order; there the candidate's own value joins. A block has a multiprocessor to itself.
//
// Of up to 64 query rows, keys are the rows of a product and queries its columns, of which there are
// as many as a group has (to the next 8): [64 keys, N] = keys x queries^T, and [D, N] += values^T x
// weights^T (`attend`). Where there are more, queries are the rows, 64 of a group, and keys the
// columns (`attend_rows`): padding costs less then than weights that go through shared memory.
// Weights are 2^(score - reference), where a query's reference is the score of its own key: no maximum
// is looked for, unless weights pass LIMIT.

constexpr int PAGE = 64;
constexpr int BOXES = D / 64;
constexpr int BOX_BYTES = PAGE * 128;  // 64 keys x 64 columns
constexpr int PART_BYTES = BOXES * BOX_BYTES;  // the keys of a page, or its values
constexpr int STAGE_BYTES = 2 * PART_BYTES;
constexpr int GROUP_ROWS = ROWS / 2;
constexpr int HALF = 256, THREADS = HALVES * HALF;
constexpr int SHARES = SPLITS * HALVES;  // halves that take pages in turn
constexpr int SUM_BYTES = (D + 4) * 4;  // a row of a group's sums; 4 further keep the banks apart
constexpr int GROUP_BYTES = GROUP_ROWS * SUM_BYTES;
// Behind both groups' sums: for each of their rows the totals that its four warps found.
constexpr int TOTALS = 2 * GROUP_BYTES;
static_assert(STAGES >= 3, "stages");
static_assert(TOTALS + 2 * GROUP_ROWS * 16 <= STAGES * STAGE_BYTES, "merged where the pages were");
constexpr int QUERY_BOX = ROWS * 128;          // queries: boxes of 64 columns
// Weights of a group and page; those of two pages have room, for a warp that has its product of the
// one may be ahead of another that has not.
constexpr int WEIGHT_BYTES = GROUP_ROWS * 128;
static_assert(2 * WEIGHT_BYTES >= 32 * 128 * 4, "so have the scores of `score_again`");
constexpr int HALF_BYTES = STAGES * STAGE_BYTES + 4 * WEIGHT_BYTES;
static_assert(HALF_BYTES % 1024 == 0, "boxes are aligned to 1024 bytes");
// Behind all halves and the queries: of each half barriers and its groups' references; scores of the
// own keys.
constexpr int REFERENCES = (STAGES * 24 + 15) / 16 * 16;
constexpr int BEHIND_BYTES = REFERENCES + 2 * GROUP_ROWS * 4;
constexpr int LANES = D / 8;  // threads of a row, 16 bytes each
constexpr int QUERY_STEPS = ROWS * LANES / THREADS;
// what a thread merges: 16 bytes of this many rows
constexpr int OWN_STEPS = QUERY_STEPS > SPLITS ? QUERY_STEPS / SPLITS : 1;
// Whether the merge reads all before it computes; else there are too few registers.
constexpr bool READS_FIRST = D == 128 ? SHARES <= 8 : SHARES <= 4;
// Sums of weights of more than this raise the reference.
constexpr float LIMIT = 18446744073709551616.0f;  // 2^64

#define NEGATIVE_INFINITY __int_as_float(0xff800000)

DEVICE float dot2(u32 a, u32 b) { return low_bf16(a) * low_bf16(b) + high_bf16(a) * high_bf16(b); }
DEVICE float dot8(uint4 a, uint4 b) {
    return dot2(a.x, b.x) + dot2(a.y, b.y) + (dot2(a.z, b.z) + dot2(a.w, b.w));
}

// 16 bytes of a row of a box, which is swizzled.
DEVICE uint4 load_chunk(u32 box, int row, int chunk) {
    const float4 x = load_shared(box + row * 128 + (chunk ^ row % 8) * 16);
    return make_uint4(__float_as_uint(x.x), __float_as_uint(x.y), __float_as_uint(x.z),
                      __float_as_uint(x.w));
}

// Where the query begins in q and out; `query` counts candidates x G of the request.
DEVICE long long place_of(int first, int kv_head, int query) {
    return ((long long)(first + query / G) * (HKV * G) + kv_head * G + query % G) * D;
}

// The pages of a unit's part, by a warp that knows the numbers of 32 of them at a time.
struct Pages {
    const TensorMap *k_map, *v_map;
    const int* numbers;  // this part's first page; the others follow SHARES apart
    int count, known;
    u32 stages, barriers;

    DEVICE int look_up(int i) const { return i < count ? numbers[i * SHARES] : 0; }
    // i: in order
    DEVICE void bring(int i, int stage, int kv_head, int lane) {
        if (i > 0 && i % 32 == 0) known = look_up(i + lane);
        const int place = __shfl_sync(0xFFFFFFFFu, known, i % 32) * PAGE;
        const u32 to = stages + stage * STAGE_BYTES, full = barriers + stage * 24;
        if (lane == 0) {
            barrier_expect(full, PART_BYTES);
#pragma unroll
            for (int box = 0; box < D / 64; box++)
                load_box_once(to + box * BOX_BYTES, k_map, full, kv_head * D + box * 64, place);
            barrier_expect(full + 8, PART_BYTES);
#pragma unroll
            for (int box = 0; box < D / 64; box++)
                load_box_once(to + PART_BYTES + box * BOX_BYTES, v_map, full + 8,
                         kv_head * D + box * 64, place);
        }
        __syncwarp();
    }
};

// Sums over the 8 lanes that hold the same queries, with the lane that differs in BIT. Where S is even
// each of the two keeps half of them, from `offset` on.
template <int S, int BIT>
DEVICE void reduce_totals(float* totals, int& offset) {
#pragma unroll
    for (int k = 0; k < (S + 1) / 2; k++) {
        if (S % 2 == 0) {
            const bool upper = threadIdx.x & BIT;
            const float give = upper ? totals[k] : totals[k + S / 2];
            const float keep = upper ? totals[k + S / 2] : totals[k];
            totals[k] = keep + __shfl_xor_sync(0xFFFFFFFFu, give, BIT);
        } else {
            totals[k] += __shfl_xor_sync(0xFFFFFFFFu, totals[k], BIT);
            if (k + (S + 1) / 2 < S)
                totals[k + (S + 1) / 2] +=
                    __shfl_xor_sync(0xFFFFFFFFu, totals[k + (S + 1) / 2], BIT);
        }
    }
    if (S % 2 == 0 && (threadIdx.x & BIT)) offset += S / 2;
}

// A group of 128 threads: what it reads, and where its pages are.
struct Group {
    u32 stages, barriers, queries, weights, references;
    int number, id, pair_id;  // of the group; of barriers: its own, that of the half
    int first_page, count, length, begin, kv_head;
    float scale;

    // N columns: its queries. At the end its sums lie where the pages were. Thread t holds keys t / 4 %
    // 8 + 16 (its warp) and 8 further; of 8 queries each, queries 2 (t % 4) and the next (wgmma's
    // layout).
    template <int N>
    DEVICE void attend(Pages& pages) const {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, t = lane % 4;
        float acc[BOXES][N / 2], scores[N / 2], total[N / 4];
#pragma unroll
        for (int b = 0; b < BOXES; b++)
#pragma unroll
            for (int j = 0; j < N / 2; j++) acc[b][j] = 0;
        settle(acc);  // not while something is multiplied
#pragma unroll
        for (int j = 0; j < N / 4; j++) total[j] = 0;
        const bool brings = warp == 0 && number == 0;
        int stage = 0, parity = 0;
        const u32 described_queries = describe(queries);
        const u32 described_weights = describe(weights);
        const u32 described_keys = describe(stages);
        const u32 described_values = describe(stages + PART_BYTES, BOX_BYTES);
        const auto multiply_page = [&](int of) {
            const u32 rows = described_keys + of * (STAGE_BYTES / 16);
#pragma unroll
            for (int k = 0; k < D / 16; k++)
                multiply_keys(scores, with_upper(rows + k / 4 * (BOX_BYTES / 16) + k % 4 * 2),
                              with_upper(described_queries + k / 4 * (QUERY_BOX / 16) + k % 4 * 2),
                              k > 0);
        };
        const auto hide = [&](int from) {  // keys that are not seen
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int at = from + warp * 16 + lane / 4 + 8 * h;
                if (at >= length || (HAS_WINDOW && at < begin))
#pragma unroll
                    for (int j = 0; j < N / 8; j++)
                        scores[4 * j + 2 * h] = scores[4 * j + 2 * h + 1] = NEGATIVE_INFINITY;
            }
        };
        u32 packed[N / 4];
        float sums[N / 4];
        const auto weigh = [&] {  // returns whether the sums pass LIMIT
            float all = 0;
#pragma unroll
            for (int j = 0; j < N / 8; j++) {
                const float2 m = load2(references + (8 * j + 2 * t) * 4);
                const float a = exp2_fast(scores[4 * j] * scale - m.x);
                const float b = exp2_fast(scores[4 * j + 1] * scale - m.y);
                const float c = exp2_fast(scores[4 * j + 2] * scale - m.x);
                const float d = exp2_fast(scores[4 * j + 3] * scale - m.y);
                sums[2 * j] = a + c, sums[2 * j + 1] = b + d;
                all += sums[2 * j] + sums[2 * j + 1];
                packed[2 * j] = pack_bf16(a, b), packed[2 * j + 1] = pack_bf16(c, d);
            }
            return all > LIMIT;
        };
        const auto store_weights = [&](int page) {  // [query, key], swizzled
            const u32 to = weights + page % 2 * WEIGHT_BYTES + lane / 16 * 1024 + lane % 8 * 128 +
                           ((2 * warp + lane / 8 % 2) ^ lane % 8) * 16;
#pragma unroll
            for (int j = 0; j + 1 < N / 8; j += 2)
                store_transposed4(to + j * 1024, packed[2 * j], packed[2 * j + 1],
                                  packed[2 * j + 2], packed[2 * j + 3]);
            if (N % 16) store_transposed2(to + (N / 8 - 1) * 1024, packed[N / 4 - 2], packed[N / 4 - 1]);
        };
        if (count > 0) {
            barrier_wait(barriers, 0);
            wgmma_fence();
            multiply_page(0);
            wgmma_commit();
            // One comes, one is asked for. All at once they would come late together, and nothing
            // would be on its way while they are read.
            if (brings && STAGES - 2 < count) pages.bring(STAGES - 2, STAGES - 2, kv_head, lane);
            wgmma_wait<0>();
            settle(scores);
        }
        u32 is_free = 0;
#pragma unroll 1
        for (int i = 0; i < count; i++) {
            const u32 values = stages + stage * STAGE_BYTES + PART_BYTES;
            const int from = (first_page + i * SHARES) * PAGE;  // position of the first key
            const bool is_partial = from + PAGE > length || (HAS_WINDOW && from < begin);
            if (is_partial) hide(from);
            const bool over = weigh();
            wgmma_wait<0>();
            settle(acc);
            if (i > 0 && lane == 0) barrier_arrive(is_free);
            store_weights(i);
            barrier_wait(barriers + stage * 24 + 8, parity);
            if (from + PAGE > length) clear_unseen(values, length - from);
            fence_async();
            if (meet_any(id, 128, over)) {  // seldom: a reference is raised
                wgmma_fence();
                multiply_page(stage);
                wgmma_commit();
                wgmma_wait<0>();
                settle(scores);
                if (is_partial) hide(from);
                // the most of each warp's 16 keys, where the weights were
                const u32 most = weights + i % 2 * WEIGHT_BYTES + t * 8;
#pragma unroll
                for (int j = 0; j < N / 4; j++) {
                    float x = fmaxf(scores[j / 2 * 4 + j % 2], scores[j / 2 * 4 + j % 2 + 2]);
#pragma unroll
                    for (int other = 4; other < 32; other *= 2)
                        x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, other));
                    if (lane < 4) store1(most + warp * 256 + j / 2 * 32 + j % 2 * 4, x * scale);
                }
                meet(id, 128);
#pragma unroll
                for (int j = 0; j < N / 4; j++) {
                    const u32 at = j / 2 * 32 + j % 2 * 4;
                    const float before = load1(references + t * 8 + at);
                    float now = before;
#pragma unroll
                    for (int w = 0; w < 4; w++) now = fmaxf(now, load1(most + w * 256 + at));
                    const float shrink = exp2_fast(before - now);
                    total[j] *= shrink;
                    sums[j] = now;
#pragma unroll
                    for (int b = 0; b < BOXES; b++) {
                        acc[b][j / 2 * 4 + j % 2] *= shrink;
                        acc[b][j / 2 * 4 + j % 2 + 2] *= shrink;
                    }
                }
                meet(id, 128);
                if (warp == 0 && lane < 4)
#pragma unroll
                    for (int j = 0; j < N / 4; j++)
                        store1(references + t * 8 + j / 2 * 32 + j % 2 * 4, sums[j]);
                meet(id, 128);
                weigh();
                store_weights(i);
                fence_async();
                meet(id, 128);
            }
#pragma unroll
            for (int j = 0; j < N / 4; j++) total[j] += sums[j];
            is_free = barriers + stage * 24 + 16;
            const int last_stage = stage;
            if (++stage == STAGES) stage = 0, parity ^= 1;
            // The scores of the next page along with it; after the last one, of whatever lies
            // there, for nobody, without a branch amid wgmma.
            if (i + 1 < count) barrier_wait(barriers + stage * 24, parity);
            wgmma_fence();
            multiply_page(stage);
            wgmma_commit();
            const u32 rows = described_values + last_stage * (STAGE_BYTES / 16);
            const u32 columns = described_weights + i % 2 * (WEIGHT_BYTES / 16);
#pragma unroll
            for (int b = 0; b < BOXES; b++)
#pragma unroll
                for (int k = 0; k < 4; k++)  // 16 keys each
                    multiply_values(acc[b], with_upper(rows + b * (BOX_BYTES / 16) + k * 128),
                                    with_upper(columns + k * 2), 1);
            wgmma_commit();
            bring_further(pages, i, last_stage, brings, lane);
            wgmma_wait<1>();
            settle(scores);
        }
        wgmma_wait<0>();
        settle(acc);

        int offset = 0;
        reduce_totals<N / 4, 16>(total, offset);
        constexpr int S1 = N / 4 % 2 == 0 ? N / 8 : N / 4;
        reduce_totals<S1, 8>(total, offset);
        constexpr int S2 = S1 % 2 == 0 ? S1 / 2 : S1;
        reduce_totals<S2, 4>(total, offset);
        constexpr int LEFT = S2 % 2 == 0 ? S2 / 2 : S2;
        meet(pair_id, HALF);  // every page was read: its place is free
#pragma unroll
        for (int j = 0; j < LEFT; j++) {
            const int query = (offset + j) / 2 * 8 + 2 * t + (offset + j) % 2;
            store1(stages + TOTALS + ((number * GROUP_ROWS + query) * 4 + warp) * 4, total[j]);
        }
#pragma unroll
        for (int b = 0; b < BOXES; b++)
#pragma unroll
            for (int j = 0; j < N / 2; j++) {
                const int query = j / 4 * 8 + 2 * t + j % 2;
                const int column = 64 * b + 16 * warp + lane / 4 + j / 2 % 2 * 8;
                store1(stages + number * GROUP_BYTES + query * SUM_BYTES + column * 4, acc[b][j]);
            }
    }

    // The same for `width` queries, which are the rows of its products. Weights stay in registers, and
    // warps wait for nobody. Thread t holds queries t / 4 % 8 + 16 (its warp) and 8 further; of 8 keys
    // each, keys 2 (t % 4) and the next.
    DEVICE void attend_rows(Pages& pages, int width) const {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, t = lane % 4;
        const int query = warp * 16 + lane / 4;
        float acc[BOXES][32], scores[32], total[2] = {0, 0}, reference[2];
#pragma unroll
        for (int b = 0; b < BOXES; b++)
#pragma unroll
            for (int j = 0; j < 32; j++) acc[b][j] = 0;
        settle(acc);  // not while something is multiplied
        const bool brings = warp == 0 && number == 0;
        const u32 described_queries = describe(queries);
        const u32 described_keys = describe(stages);
        const u32 described_values = describe(stages + PART_BYTES, BOX_BYTES);
        const auto multiply_page = [&](int of) {
            const u32 keys = described_keys + of * (STAGE_BYTES / 16);
#pragma unroll
            for (int k = 0; k < D / 16; k++)
                multiply_keys(scores,
                              with_upper(described_queries + k / 4 * (QUERY_BOX / 16) + k % 4 * 2),
                              with_upper(keys + k / 4 * (BOX_BYTES / 16) + k % 4 * 2), k > 0);
        };
#pragma unroll
        for (int h = 0; h < 2; h++)  // the last warps may have rows that are of nobody
            reference[h] = query + 8 * h < width ? load1(references + (query + 8 * h) * 4) : 0;
        const auto hide = [&](int from) {  // keys that are not seen
#pragma unroll
            for (int j = 0; j < 32; j++) {
                const int at = from + j / 4 * 8 + 2 * t + j % 2;
                if (at >= length || (HAS_WINDOW && at < begin)) scores[j] = NEGATIVE_INFINITY;
            }
        };
        int stage = 0, parity = 0;
        if (count > 0) {
            barrier_wait(barriers, 0);
            wgmma_fence();
            multiply_page(0);
            wgmma_commit();
            if (brings && STAGES - 2 < count) pages.bring(STAGES - 2, STAGES - 2, kv_head, lane);
            wgmma_wait<0>();
            settle(scores);
        }
        u32 is_free = 0;
#pragma unroll 1
        for (int i = 0; i < count; i++) {
            const u32 values = stages + stage * STAGE_BYTES + PART_BYTES;
            const int from = (first_page + i * SHARES) * PAGE;  // position of the first key
            const bool is_partial = from + PAGE > length || (HAS_WINDOW && from < begin);
            if (is_partial) hide(from);
            float sum[2], shrink[2] = {1, 1};
            const auto weigh = [&] {
                sum[0] = total[0], sum[1] = total[1];
#pragma unroll
                for (int j = 0; j < 32; j++) {
                    scores[j] = exp2_fast(scores[j] * scale - reference[j / 2 % 2]);
                    sum[j / 2 % 2] += scores[j];
                }
            };
            weigh();
            const bool over = __any_sync(0xFFFFFFFFu, fmaxf(sum[0], sum[1]) > LIMIT);
            if (over) {  // seldom: references are raised
                score_again(scores, stages + stage * STAGE_BYTES, query, t);
                if (is_partial) hide(from);
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    float x = reference[h];
#pragma unroll
                    for (int j = 0; j < 32; j++)
                        if (j / 2 % 2 == h) x = fmaxf(x, scores[j] * scale);
                    x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 1));
                    x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 2));
                    shrink[h] = exp2_fast(reference[h] - x);
                    total[h] *= shrink[h];
                    reference[h] = x;
                }
                weigh();
            }
            total[0] = sum[0], total[1] = sum[1];
            wgmma_wait<0>();
            settle(acc);
            if (i > 0 && lane == 0) barrier_arrive(is_free);
            if (over) {
#pragma unroll
                for (int b = 0; b < BOXES; b++)
#pragma unroll
                    for (int j = 0; j < 32; j++) acc[b][j] *= shrink[j / 2 % 2];
            }
            u32 packed[16];
#pragma unroll
            for (int j = 0; j < 16; j++) packed[j] = pack_bf16(scores[2 * j], scores[2 * j + 1]);
            barrier_wait(barriers + stage * 24 + 8, parity);
            if (from + PAGE > length) {
                clear_unseen(values, length - from);
                fence_async();
                meet(id, 128);
            }
            is_free = barriers + stage * 24 + 16;
            const int last_stage = stage;
            if (++stage == STAGES) stage = 0, parity ^= 1;
            if (i + 1 < count) barrier_wait(barriers + stage * 24, parity);
            wgmma_fence();
            multiply_page(stage);  // after the last one: see `attend`
            wgmma_commit();
            const u32 rows = described_values + last_stage * (STAGE_BYTES / 16);
#pragma unroll
            for (int b = 0; b < BOXES; b++)
#pragma unroll
                for (int k = 0; k < 4; k++)  // 16 keys each
                    multiply_weights(acc[b], packed[4 * k], packed[4 * k + 1], packed[4 * k + 2],
                                     packed[4 * k + 3],
                                     with_upper(rows + b * (BOX_BYTES / 16) + k * 128), 1);
            wgmma_commit();
            bring_further(pages, i, last_stage, brings, lane);
            wgmma_wait<1>();
            settle(scores);
        }
        wgmma_wait<0>();
        settle(acc);
        meet(pair_id, HALF);  // every page was read: its place is free
#pragma unroll
        for (int h = 0; h < 2; h++) {
            total[h] += __shfl_xor_sync(0xFFFFFFFFu, total[h], 1);
            total[h] += __shfl_xor_sync(0xFFFFFFFFu, total[h], 2);
            if (query + 8 * h >= width) continue;
            const int row = number * GROUP_ROWS + query + 8 * h;
            store1(stages + TOTALS + (row * 4 + t) * 4, t == 0 ? total[h] : 0);
            if (t == 0) store1(references + (query + 8 * h) * 4, reference[h]);
#pragma unroll
            for (int b = 0; b < BOXES; b++)
#pragma unroll
                for (int j = 0; j < 8; j++)
                    store2(stages + row * SUM_BYTES + (64 * b + 8 * j + 2 * t) * 4,
                           acc[b][4 * j + 2 * h], acc[b][4 * j + 2 * h + 1]);
        }
    }

    // The scores of queries `query` and 8 further over the page at `keys`, without wgmma, which a warp
    // cannot issue alone, and in few registers: by way of where the weights of `attend` would be.
    DEVICE void score_again(float (&scores)[32], u32 keys, int query, int t) const {
        const u32 place = weights + threadIdx.x % 128 * 4;
#pragma unroll 1
        for (int n = 0; n < 16; n++) {
            const int key = n / 2 * 8 + 2 * t + n % 2;
            float found[2] = {0, 0};
#pragma unroll 1
            for (int chunk = 0; chunk < LANES; chunk++) {
                const uint4 k = load_chunk(keys + chunk / 8 * BOX_BYTES, key, chunk % 8);
#pragma unroll
                for (int h = 0; h < 2; h++)
                    found[h] += dot8(k, load_chunk(queries + chunk / 8 * QUERY_BOX, query + 8 * h,
                                                   chunk % 8));
            }
#pragma unroll
            for (int h = 0; h < 2; h++) store1(place + (2 * n + h) * 512, found[h]);
        }
#pragma unroll
        for (int j = 0; j < 32; j++)
            scores[j] = load1(place + (2 * (j / 4 * 2 + j % 2) + j / 2 % 2) * 512);
    }

    // Weight 0 of a stale NaN would be NaN: values behind those that are seen become 0.
    DEVICE void clear_unseen(u32 values, int seen) const {
#pragma unroll 1
        for (int j = threadIdx.x % 128; j < (PAGE - seen) * LANES; j += 128) {
            const int key = seen + j / LANES;
            const u32 to = values + j % LANES / 8 * BOX_BYTES + key * 128 + j % 8 * 16;
            store4(to, make_uint4(0, 0, 0, 0));
        }
    }

    // In place of the page before page i, which lies in `stage`.
    DEVICE void bring_further(Pages& pages, int i, int stage, bool brings, int lane) const {
        const int further = i - 1 + STAGES;
        if (!brings || further >= count) return;
        const int emptied = stage > 0 ? stage - 1 : STAGES - 1;
        if (i > 0) barrier_wait(barriers + emptied * 24 + 16, (further / STAGES - 1) & 1);
        pages.bring(further, emptied, kv_head, lane);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    run(const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map,
        const u16* q, const u16* own_k, const u16* own_v, const long long* own_index,
        const int* units, u16* out, float scale, int window, int num_columns) {
    extern __shared__ __align__(1024) u8 dynamic[];
    // one value for the whole warp, which the compiler should know
    const int warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const int half = warp / 8, thread = threadIdx.x;
    const u32 memory = shared_address(dynamic), stages = memory + half * HALF_BYTES;
    const u32 queries = memory + HALVES * HALF_BYTES;
    const u32 all_behind = queries + BOXES * QUERY_BOX;
    // of a stage: its keys have come, its values have come, it is free
    const u32 barriers = all_behind + half * BEHIND_BYTES;
    const u32 own_scores = all_behind + HALVES * BEHIND_BYTES;
    const int split = blockIdx.x % SPLITS, share = split * HALVES + half;
    launch_next();
    const int* const plan = units + (long long)(blockIdx.x / SPLITS) * plan_stride(num_columns);
    // The first pages' numbers come with the unit; where there is a window, after it.
    int known = 0;
    if (!HAS_WINDOW && warp % 8 == 0 && share + lane * SHARES < num_columns)
        known = plan[8 + share + lane * SHARES];
    const Unit unit = *(const Unit*)plan;
    if (thread % HALF == 0) {
        prefetch_map(&k_map);
        prefetch_map(&v_map);
        for (int i = 0; i < STAGES; i++) {
            barrier_init(barriers + i * 24, 1);
            barrier_init(barriers + i * 24 + 8, 1);
            barrier_init(barriers + i * 24 + 16, 8);  // warps
        }
        barrier_init_fence();
    }
    const int first = unit.first, end = unit.end, length = unit.length;
    const int tile = unit.tile, kv_head = unit.kv_head;
    const int num_queries = min((end - first) * G - tile * ROWS, ROWS);
    if (num_queries <= 0) return;  // so it is in the whole cluster: nothing is read or written
    int begin = 0;
    if (HAS_WINDOW) begin = max(length - window + 1, 0);
    const int first_page = begin / PAGE + share;
    const int last_page = begin < length ? (length + PAGE - 1) / PAGE : 0;
    const int count = first_page < last_page ? (last_page - first_page - 1) / SHARES + 1 : 0;
    const int width = ((num_queries + 1) / 2 + 7) / 8 * 8;  // of each group

    Pages pages;
    if (warp % 8 == 0) {
        pages = {&k_map, &v_map, plan + 8 + first_page, count, known, stages, barriers};
        if (HAS_WINDOW) pages.known = pages.look_up(lane);
        __syncwarp();
        for (int i = 0; i < min(count, STAGES - 2); i++) pages.bring(i, i, kv_head, lane);
    }
    const auto find_own = [&](int query) {
        const int token = first + query / G;
        const long long own = OWN_IS_TOKEN ? token : own_index[token];
        return (own * HKV + kv_head) * D;
    };
    // where a group keeps what belongs to a row
    const auto slot_of = [&](int row) { return row < width ? row : row - width + GROUP_ROWS; };
    wait_for_previous();
    {
        uint4 query[QUERY_STEPS], key[QUERY_STEPS];
#pragma unroll
        for (int j = 0; j < QUERY_STEPS; j++) {
            const int i = thread + THREADS * j, row = i / LANES, column = i % LANES * 8;
            query[j] = key[j] = make_uint4(0, 0, 0, 0);
            if (row < num_queries) {
                const int at = tile * ROWS + row;
                query[j] = *(const uint4*)(q + place_of(first, kv_head, at) + column);
                key[j] = *(const uint4*)(own_k + find_own(at) + column);
            }
        }
#pragma unroll
        for (int j = 0; j < QUERY_STEPS; j++) {
            const int i = thread + THREADS * j, row = i / LANES, chunk = i % LANES;
            store4(queries + chunk / 8 * QUERY_BOX + row * 128 + (chunk % 8 ^ row % 8) * 16, query[j]);
            float score = dot8(query[j], key[j]);
#pragma unroll
            for (int other = LANES / 2; other > 0; other /= 2)
                score += __shfl_xor_sync(0xFFFFFFFFu, score, other);
            score *= scale;
            if (chunk == 0 && row < 2 * width) {
                store1(own_scores + row * 4, score);
#pragma unroll
                for (int h = 0; h < HALVES; h++)
                    store1(all_behind + h * BEHIND_BYTES + REFERENCES + slot_of(row) * 4, score);
            }
        }
    }
    fence_async();
    meet(1, THREADS);  // queries, references and barriers are there
    const int total_chunks = num_queries * LANES;
    {
        const int number = warp / 4 % 2;
        const Group group = {stages, barriers, queries + number * width * 128,
                             stages + STAGES * STAGE_BYTES + number * 2 * WEIGHT_BYTES,
                             barriers + REFERENCES + number * GROUP_ROWS * 4, number, 4 + warp / 4,
                             2 + half, first_page, count, length, begin, kv_head, scale};
        switch (width / 8) {
            case 1: group.attend<8>(pages); break;
            case 2: group.attend<16>(pages); break;
            case 3: group.attend<24>(pages); break;
            case 4: group.attend<32>(pages); break;
            default: group.attend_rows(pages, width);
        }
    }
    uint4 own_value[OWN_STEPS];
#pragma unroll
    for (int j = 0; j < OWN_STEPS; j++) {
        const int i = thread + THREADS * (split + SPLITS * j);
        own_value[j] = make_uint4(0, 0, 0, 0);
        if (i < total_chunks)
            own_value[j] =
                *(const uint4*)(own_v + find_own(tile * ROWS + i / LANES) + i % LANES * 8);
    }
    __syncwarp();
    if (SPLITS > 1) {
        cluster_arrive();
        cluster_wait();
    } else {
        meet(1, THREADS);
    }
    // 8 columns of a row at a time, over all threads of the cluster; the own key comes first
    float2 found[OWN_STEPS][SHARES];  // reference and total
    float4 parts[OWN_STEPS][SHARES][2];
    const auto address_of = [&](u32 place, int s, int half_bytes) {
        const u32 here = place + s % HALVES * half_bytes;
        return SPLITS > 1 ? address_at(here, s / HALVES) : here;
    };
    const auto read4 = [](u32 there) { return SPLITS > 1 ? load4_at(there) : load_shared(there); };
    const auto read1 = [](u32 there) { return SPLITS > 1 ? load1_at(there) : load1(there); };
    const auto read_parts = [&](float4 (&to)[2], int i, int s) {
        const u32 there = address_of(memory + slot_of(i / LANES) * SUM_BYTES + i % LANES * 32, s,
                                     HALF_BYTES);
        to[0] = read4(there);
        to[1] = read4(there + 16);
    };
#pragma unroll
    for (int step = 0; step < OWN_STEPS; step++) {
        const int i = thread + THREADS * (split + SPLITS * step);
#pragma unroll
        for (int s = 0; s < SHARES; s++) {
            found[step][s] = make_float2(NEGATIVE_INFINITY, 0);
            if (i >= total_chunks) continue;
            const int slot = slot_of(i / LANES);
            const float4 totals = read4(address_of(memory + TOTALS + slot * 16, s, HALF_BYTES));
            const u32 reference = all_behind + REFERENCES + slot * 4;
            found[step][s] = make_float2(read1(address_of(reference, s, BEHIND_BYTES)),
                                         totals.x + totals.y + (totals.z + totals.w));
            if (READS_FIRST) read_parts(parts[step][s], i, s);
        }
    }
#pragma unroll
    for (int step = 0; step < OWN_STEPS; step++) {
        const int i = thread + THREADS * (split + SPLITS * step);
        if (i >= total_chunks) break;
        const float own_score = load1(own_scores + i / LANES * 4);
        float most = own_score;
#pragma unroll
        for (int s = 0; s < SHARES; s++) most = fmaxf(most, found[step][s].x);
        float total = exp2_fast(own_score - most);
        const uint4 own = own_value[step];
        float sums[8] = {low_bf16(own.x) * total, high_bf16(own.x) * total,
                         low_bf16(own.y) * total, high_bf16(own.y) * total,
                         low_bf16(own.z) * total, high_bf16(own.z) * total,
                         low_bf16(own.w) * total, high_bf16(own.w) * total};
#pragma unroll
        for (int s = 0; s < SHARES; s++) {
            const float weight = exp2_fast(found[step][s].x - most);
            if (!READS_FIRST) read_parts(parts[step][s], i, s);
            const float4 a = parts[step][s][0], b = parts[step][s][1];
            total += found[step][s].y * weight;
            sums[0] += a.x * weight, sums[1] += a.y * weight;
            sums[2] += a.z * weight, sums[3] += a.w * weight;
            sums[4] += b.x * weight, sums[5] += b.y * weight;
            sums[6] += b.z * weight, sums[7] += b.w * weight;
        }
        const float norm = 1 / total;
        store16_global(out + place_of(first, kv_head, tile * ROWS + i / LANES) + i % LANES * 8,
                       pack_bf16(sums[0] * norm, sums[1] * norm),
                       pack_bf16(sums[2] * norm, sums[3] * norm),
                       pack_bf16(sums[4] * norm, sums[5] * norm),
                       pack_bf16(sums[6] * norm, sums[7] * norm));
    }
    if (SPLITS > 1) {  // the others may still read what lies here
        __syncwarp();
        cluster_arrive_relaxed();
        cluster_wait();
    }
}
