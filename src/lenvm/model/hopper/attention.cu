// Attention of candidates over their request's prefix, page by page, and themselves.
//
// Definitions: D (head size: 64 or 128), G (query heads of a key head), HKV, STAGES (pages of a half
// on their way, even), SPLITS (blocks of a cluster), HALVES (of a block: 1 or 2), ROWS (128),
// HAS_WINDOW, OWN_IS_TOKEN; multiply_keys and multiply_weights for 64 columns.
//
// A cluster serves a unit of `plan.cu`: up to ROWS query rows of one request and key head. Its
// blocks' halves of 256 threads take pages in turn. A half is two groups of 128 threads, each of which
// computes 64 rows: of up to 64 each group takes every other page of its half, of more each takes its
// rows over all of them. A group's first warp brings further pages: one that does nothing else would
// take registers from the others. What all found is merged in shared memory across the cluster, always
// in the same order; there the candidate's own value joins. A block has a multiprocessor to itself.
//
// Weights are 2^(score - reference), where a query's reference is the score of its own key: no maximum
// is looked for, unless weights pass LIMIT.

constexpr int PAGE = 64;
constexpr int BOXES = D / 64;
constexpr int BOX_BYTES = PAGE * 128;  // 64 keys x 64 columns
constexpr int PART_BYTES = BOXES * BOX_BYTES;  // the keys of a page, or its values
constexpr int STAGE_BYTES = 2 * PART_BYTES;
constexpr int GROUP_ROWS = 64;
constexpr int HALF = 256, THREADS = HALVES * HALF;
constexpr int TURNS = SPLITS * HALVES;  // halves that take pages in turn
constexpr int SUM_BYTES = (D + 4) * 4;  // a row of a group's sums; 4 further keep the banks apart
constexpr int GROUP_BYTES = GROUP_ROWS * SUM_BYTES;
static_assert(STAGES >= 6 && STAGES % 2 == 0, "a group alone has three of its half's");
static_assert(2 * GROUP_BYTES <= STAGES * STAGE_BYTES, "merged where the pages were");
constexpr int QUERY_BOX = ROWS * 128;  // queries: boxes of 64 columns
constexpr int HALF_BYTES = STAGES * STAGE_BYTES;
constexpr int EARLY = 2;  // pages of a half that are asked for at first
// Behind all halves and the queries: of each half barriers, and of its groups' rows the reference and
// the total of weights; scores of the own keys.
constexpr int TOTALS = STAGES * 24;
constexpr int BEHIND_BYTES = TOTALS + 2 * GROUP_ROWS * 8;
constexpr int LANES = D / 8;  // threads of a row, 16 bytes each
constexpr int QUERY_STEPS = ROWS * LANES / THREADS;
// what a thread merges: 16 bytes of this many rows
constexpr int OWN_STEPS = QUERY_STEPS > SPLITS ? QUERY_STEPS / SPLITS : 1;
constexpr int AT_ONCE = TURNS < 4 ? TURNS : 4;  // halves of which the merge reads
// Sums of weights of more than this raise the reference.
constexpr float LIMIT = 18446744073709551616.0f;  // 2^64

#define NEGATIVE_INFINITY __int_as_float(0xff800000)

// A unit in shared memory, 32 bytes.
DEVICE void store_unit(u32 to, const Unit& unit) {
    store4(to, make_uint4(unit.first, unit.end, unit.length, unit.tile));
    store1(to + 16, __int_as_float(unit.kv_head));
}
DEVICE Unit load_unit(u32 from) {
    const float4 x = load_shared(from);
    return {__float_as_int(x.x), __float_as_int(x.y), __float_as_int(x.z), __float_as_int(x.w),
            __float_as_int(load1(from + 16))};
}

DEVICE float dot2(u32 a, u32 b) { return low_bf16(a) * low_bf16(b) + high_bf16(a) * high_bf16(b); }
DEVICE float dot8(uint4 a, uint4 b) {
    return dot2(a.x, b.x) + dot2(a.y, b.y) + (dot2(a.z, b.z) + dot2(a.w, b.w));
}

// Query rows of a unit.
DEVICE int count_queries(const Unit& unit) {
    return min((unit.end - unit.first) * G - unit.tile * ROWS, ROWS);
}
// 2: a half's groups take its pages in turn, each for all rows. 1: each takes its own rows over all.
DEVICE int step_of(int num_queries) { return num_queries > GROUP_ROWS ? 1 : 2; }

// Where the query begins in q and out; `query` counts candidates x G of the request.
DEVICE long long place_of(int first, int kv_head, int query) {
    return ((long long)(first + query / G) * (HKV * G) + kv_head * G + query % G) * D;
}

// The pages of a half, of which a warp brings every `step`-th. It knows the numbers of 32 of them at a
// time.
struct Pages {
    const TensorMap *k_map, *v_map;
    const int* numbers;  // the half's first page; the others follow TURNS apart
    int count, known, next;  // `next` to bring
    u32 stages, barriers;

    DEVICE int look_up(int i) const { return i < count ? numbers[i * TURNS] : 0; }
    // Pages up to that one, once their places are free.
    DEVICE void bring_until(int last, int step, int kv_head, int lane) {
        if (last >= count) last = count - 1;
#pragma unroll 1
        for (; next <= last; next += step) {
            if (next >= 32 && next % 32 < step) known = look_up(next / 32 * 32 + lane);
            const int place = __shfl_sync(0xFFFFFFFFu, known, next % 32) * PAGE;
            const int stage = next % STAGES;
            const u32 to = stages + stage * STAGE_BYTES, full = barriers + stage * 24;
            if (next >= STAGES) barrier_wait(full + 16, (next / STAGES - 1) & 1);
            if (lane == 0) {
                barrier_expect(full, PART_BYTES);
#pragma unroll
                for (int box = 0; box < BOXES; box++)
                    load_box_once(to + box * BOX_BYTES, k_map, full, kv_head * D + box * 64, place);
                barrier_expect(full + 8, PART_BYTES);
#pragma unroll
                for (int box = 0; box < BOXES; box++)
                    load_box_once(to + PART_BYTES + box * BOX_BYTES, v_map, full + 8,
                                  kv_head * D + box * 64, place);
            }
            __syncwarp();
        }
    }
};

// A group of 128 threads: what it reads, and where its pages are.
struct Group {
    u32 stages, barriers, queries;
    u32 totals;  // of its rows: reference and total
    u32 sums;    // of its rows, at the end
    int number, id, pair_id;  // of the group; of barriers: its own, that of the half
    int first_page, count, length, begin, kv_head;
    float scale;

    // Of `width` queries, which are the rows of its products; keys of a page are the columns. Weights
    // stay in registers, and warps wait for nobody. Thread t holds queries t / 4 % 8 + 16 (its warp)
    // and 8 further; of 8 keys each, keys 2 (t % 4) and the next. STEP: see `step_of`.
    template <int STEP>
    DEVICE void attend(Pages& pages, int width) const {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, t = lane % 4;
        const int query = warp * 16 + lane / 4;
        float acc[BOXES][32], scores[32], total[2] = {0, 0}, reference[2];
#pragma unroll
        for (int b = 0; b < BOXES; b++)
#pragma unroll
            for (int j = 0; j < 32; j++) acc[b][j] = 0;
        settle(acc);  // not while something is multiplied
        const bool brings = warp == 0 && number < STEP;
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
            reference[h] = query + 8 * h < width ? load1(totals + (query + 8 * h) * 8) : 0;
        const auto hide = [&](int from) {  // keys that are not seen
#pragma unroll
            for (int j = 0; j < 32; j++) {
                const int at = from + j / 4 * 8 + 2 * t + j % 2;
                if (at >= length || (HAS_WINDOW && at < begin)) scores[j] = NEGATIVE_INFINITY;
            }
        };
        int i = STEP == 2 ? number : 0, stage = i, parity = 0;
        int before = -1;  // the stage of the page before
        if (i < count) {
            barrier_wait(barriers + stage * 24, 0);
            wgmma_fence();
            multiply_page(stage);
            wgmma_commit();
            if (brings) pages.bring_until(i + EARLY, STEP, kv_head, lane);
            wgmma_wait<0>();
            settle(scores);
        }
#pragma unroll 1
        for (; i < count; i += STEP) {
            const u32 values = stages + stage * STAGE_BYTES + PART_BYTES;
            const int from = (first_page + i * TURNS) * PAGE;  // position of the first key
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
                score_again(scores, stages + stage * STAGE_BYTES);
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
            // of the page before: this warp has read it. There are 8 arrivals of it.
            if (before >= 0 && lane < STEP) barrier_arrive(barriers + before * 24 + 16);
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
            before = stage;
            if ((stage += STEP) >= STAGES) stage -= STAGES, parity ^= 1;
            if (i + STEP < count) barrier_wait(barriers + stage * 24, parity);
            wgmma_fence();
            // The scores of the next page along with it; after the last one, of whatever lies there,
            // for nobody, without a branch amid wgmma.
            multiply_page(stage);
            wgmma_commit();
            const u32 rows = described_values + before * (STAGE_BYTES / 16);
#pragma unroll
            for (int b = 0; b < BOXES; b++)
#pragma unroll
                for (int k = 0; k < 4; k++)  // 16 keys each
                    multiply_weights(acc[b], packed[4 * k], packed[4 * k + 1], packed[4 * k + 2],
                                     packed[4 * k + 3],
                                     with_upper(rows + b * (BOX_BYTES / 16) + k * 128), 1);
            wgmma_commit();
            if (brings) pages.bring_until(i - STEP + STAGES, STEP, kv_head, lane);
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
            const int row = query + 8 * h;
            if (row >= width) continue;
            if (t == 0) store2(totals + row * 8, reference[h], total[h]);
#pragma unroll
            for (int b = 0; b < BOXES; b++)
#pragma unroll
                for (int j = 0; j < 8; j++)
                    store2(sums + row * SUM_BYTES + (64 * b + 8 * j + 2 * t) * 4,
                           acc[b][4 * j + 2 * h], acc[b][4 * j + 2 * h + 1]);
        }
    }

    // The scores of this warp's queries over the page at `keys`, without wgmma, which a warp cannot
    // issue alone.
    DEVICE void score_again(float (&scores)[32], u32 keys) const {
        const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane % 16;
#pragma unroll
        for (int j = 0; j < 32; j++) scores[j] = 0;
#pragma unroll 1
        for (int k = 0; k < D / 16; k++) {
            u32 query[4], key[2];
            load_matrices(queries + k / 4 * QUERY_BOX + row * 128 +
                              ((k % 4 * 2 + lane / 16) ^ row % 8) * 16,
                          query);
#pragma unroll
            for (int n = 0; n < 8; n++) {
                load_matrices(keys + k / 4 * BOX_BYTES + (8 * n + lane % 8) * 128 +
                                  ((k % 4 * 2 + lane / 8 % 2) ^ lane % 8) * 16,
                              key);
                multiply_small(*(float(*)[4])(scores + 4 * n), query, key);
            }
        }
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
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    run(const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map,
        const u16* q, const u16* own_k, const u16* own_v, const long long* own_index,
        const int* units, u16* out, float scale, int window, int num_columns) {
    extern __shared__ __align__(1024) u8 dynamic[];
    // one value for the whole warp, which the compiler should know
    const int warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const int half = warp / 8, number = warp / 4 % 2, thread = threadIdx.x;
    const u32 memory = shared_address(dynamic), stages = memory + half * HALF_BYTES;
    const u32 queries = memory + HALVES * HALF_BYTES;
    const u32 all_behind = queries + BOXES * QUERY_BOX;
    // of a stage: its keys have come, its values have come, it is free
    const u32 barriers = all_behind + half * BEHIND_BYTES;
    const u32 own_scores = all_behind + HALVES * BEHIND_BYTES;
    const int split = blockIdx.x % SPLITS, turn = split * HALVES + half;
    launch_next();
    const int* const plan = units + (long long)(blockIdx.x / SPLITS) * plan_stride(num_columns);
    // The first pages' numbers come with the unit; where there is a window, after it.
    int known = 0;
    if (!HAS_WINDOW && warp % 4 == 0 && turn + lane * TURNS < num_columns)
        known = plan[8 + turn + lane * TURNS];
    const Unit unit = *(const Unit*)plan;
    const u32 kept = own_scores + ROWS * 4;  // the unit, for the end: not in registers
    if (thread == 0) store_unit(kept, unit);
    if (thread % HALF == 0) {
        prefetch_map(&k_map);
        prefetch_map(&v_map);
        for (int i = 0; i < STAGES; i++) {
            barrier_init(barriers + i * 24, 1);
            barrier_init(barriers + i * 24 + 8, 1);
            barrier_init(barriers + i * 24 + 16, 8);  // each warp: once, or twice in one group
        }
        barrier_init_fence();
    }
    const auto find_own = [&](int first, int kv_head, int query) {
        const int token = first + query / G;
        const long long own = OWN_IS_TOKEN ? token : own_index[token];
        return (own * HKV + kv_head) * D;
    };
    const int first = unit.first, length = unit.length;
    const int tile = unit.tile, kv_head = unit.kv_head;
    const int num_queries = count_queries(unit);
    if (num_queries <= 0) return;  // so it is in the whole cluster: nothing is read or written
    int begin = 0;
    if (HAS_WINDOW) begin = max(length - window + 1, 0);
    const int first_page = begin / PAGE + turn;
    const int last_page = begin < length ? (length + PAGE - 1) / PAGE : 0;
    const int count = first_page < last_page ? (last_page - first_page - 1) / TURNS + 1 : 0;
    const int step = step_of(num_queries);

    Pages pages;
    if (warp % 4 == 0 && number < step) {
        pages = {&k_map, &v_map, plan + 8 + first_page, count, known, 0, stages, barriers};
        if (HAS_WINDOW) pages.known = pages.look_up(lane);
        __syncwarp();
        // the first ones for both groups, by the warp that made the barriers
        if (number == 0) pages.bring_until(EARLY - 1, 1, kv_head, lane);
        pages.next = step == 1 ? EARLY : EARLY + (EARLY + number) % 2;
    }
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
                key[j] = *(const uint4*)(own_k + find_own(first, kv_head, at) + column);
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
            if (chunk == 0 && row < num_queries) {
                store1(own_scores + row * 4, score);
#pragma unroll
                for (int h = 0; h < HALVES; h++)
                    for (int g = 0; g < step; g++)  // row: of both groups, or of one
                        store1(all_behind + h * BEHIND_BYTES + TOTALS + (g * GROUP_ROWS + row) * 8,
                               score);
            }
        }
    }
    fence_async();
    meet(1, THREADS);  // queries, references and barriers are there
    {
        const int row = step == 1 ? number * GROUP_ROWS : 0;  // the group's first
        const Group group = {stages, barriers, queries + row * 128,
                             barriers + TOTALS + number * GROUP_ROWS * 8,
                             stages + number * GROUP_BYTES, number, 4 + warp / 4, 2 + half,
                             first_page, count, length, begin, kv_head, scale};
        if (step == 1)
            group.attend<1>(pages, min(num_queries - row, GROUP_ROWS));
        else
            group.attend<2>(pages, num_queries);
    }
    // What the merge needs; and the candidates' own values.
    const Unit same = load_unit(kept);
    const int total_rows = count_queries(same), groups_of_a_row = step_of(total_rows);
    const int total_chunks = total_rows * LANES;
    uint4 own_value[OWN_STEPS];
#pragma unroll
    for (int j = 0; j < OWN_STEPS; j++) {
        const int i = thread + THREADS * (split + SPLITS * j);
        own_value[j] = make_uint4(0, 0, 0, 0);
        if (i < total_chunks)
            own_value[j] = *(const uint4*)(
                own_v + find_own(same.first, same.kv_head, same.tile * ROWS + i / LANES) +
                i % LANES * 8);
    }
    __syncwarp();
    if (SPLITS > 1) {
        cluster_arrive();
        cluster_wait();
    } else {
        meet(1, THREADS);
    }
    // 8 columns of a row at a time, over all threads of the cluster; the own key comes first
    const auto address_of = [&](u32 place, int s, int half_bytes) {
        const u32 here = place + s % HALVES * half_bytes;
        return SPLITS > 1 ? address_at(here, s / HALVES) : here;
    };
    const auto read4 = [](u32 there) { return SPLITS > 1 ? load4_at(there) : load_shared(there); };
    const auto read2 = [](u32 there) { return SPLITS > 1 ? load2_at(there) : load2(there); };
#pragma unroll
    for (int j = 0; j < OWN_STEPS; j++) {
        const int i = thread + THREADS * (split + SPLITS * j);
        if (i >= total_chunks) break;
        const int row = i / LANES;
        const float own_score = load1(own_scores + row * 4);
        // of each group that had the row, its reference and total
        const auto found = [&](int s, int g) {
            return read2(
                address_of(all_behind + TOTALS + (g * GROUP_ROWS + row) * 8, s, BEHIND_BYTES));
        };
        float most = own_score;
#pragma unroll AT_ONCE
        for (int s = 0; s < TURNS; s++) {
            most = fmaxf(most, found(s, 0).x);
            if (groups_of_a_row == 2) most = fmaxf(most, found(s, 1).x);
        }
        float total = exp2_fast(own_score - most);
        const uint4 own = own_value[j];
        float sums[8] = {low_bf16(own.x) * total, high_bf16(own.x) * total,
                         low_bf16(own.y) * total, high_bf16(own.y) * total,
                         low_bf16(own.z) * total, high_bf16(own.z) * total,
                         low_bf16(own.w) * total, high_bf16(own.w) * total};
#pragma unroll AT_ONCE
        for (int s = 0; s < TURNS; s++)
#pragma unroll
            for (int g = 0; g < 2; g++) {
                if (g == groups_of_a_row) continue;
                const float2 mine = found(s, g);
                const u32 there = address_of(
                    memory + g * GROUP_BYTES + row * SUM_BYTES + i % LANES * 32, s, HALF_BYTES);
                const float4 a = read4(there), b = read4(there + 16);
                const float weight = exp2_fast(mine.x - most);
                total += mine.y * weight;
                sums[0] += a.x * weight, sums[1] += a.y * weight;
                sums[2] += a.z * weight, sums[3] += a.w * weight;
                sums[4] += b.x * weight, sums[5] += b.y * weight;
                sums[6] += b.z * weight, sums[7] += b.w * weight;
            }
        const float norm = 1 / total;
        const long long place = place_of(same.first, same.kv_head, same.tile * ROWS + row);
        store16_global(out + place + i % LANES * 8,
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
