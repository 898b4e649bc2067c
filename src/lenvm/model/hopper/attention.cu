// Attention of candidates over their request's prefix, page by page, and themselves.
//
// Definitions: D (head size: 64 or 128), G (query heads of a key head), HKV, STAGES (pages of a half
// on their way, even), SPLITS (blocks of a cluster), HALVES (of a block: 1 or 2), ROWS (128),
// HAS_WINDOW, OWN_IS_TOKEN; multiply_keys and multiply_weights for 64 columns.
//
// A cluster serves a unit of `plan.cu`: up to ROWS query rows of one request and key head. Its
// blocks' halves of 256 threads take pages in turn. A half is two groups of 128 threads, each of which
// computes 64 rows: of up to 64 each group takes every other page of its half, of more each takes its
// rows over all of them. One further warp brings the pages: to ask for one takes 500 cycles, for
// which a group would wait. It and three beside it clear what lies behind the last key. What all
// found is merged in shared memory across the cluster, always in the same order; there the
// candidate's own value joins. A block has a multiprocessor to itself.
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
// The warp that brings pages has three beside it, for a warpgroup can give registers to others: of two
// halves each of 640 threads has 96, which are too few for those that compute.
constexpr int ALL_THREADS = THREADS + 128, FETCHER = THREADS / 32;
constexpr int TURNS = SPLITS * HALVES;  // halves that take pages in turn
constexpr int SUM_BYTES = (D + 8) * 4;  // a row of a group's sums; 8 further keep the banks apart
constexpr int GROUP_BYTES = GROUP_ROWS * SUM_BYTES;
static_assert(STAGES >= 6 && STAGES % 2 == 0, "a group alone has three of its half's");
static_assert(2 * GROUP_BYTES <= STAGES * STAGE_BYTES, "merged where the pages were");
constexpr int QUERY_BOX = ROWS * 128;  // queries: boxes of 64 columns
constexpr int HALF_BYTES = STAGES * STAGE_BYTES;
// Pages of a half that are asked for at first, and before the queries have come: more of them would
// delay the kernel before, and the queries.
constexpr int EARLY = 2, SECOND = 3;
// Behind all halves and the queries: of each half barriers, and of its groups' rows the reference and
// the total of weights; scores of the own keys.
constexpr int TOTALS = STAGES * 16;
constexpr int BEHIND_BYTES = TOTALS + 2 * GROUP_ROWS * 8;
constexpr int LANES = D / 8;  // threads of a row, 16 bytes each
constexpr int QUERY_STEPS = ROWS * LANES / THREADS;
// what a thread merges: 4 columns of either half of this many rows
constexpr int OWN_STEPS = QUERY_STEPS > SPLITS ? QUERY_STEPS / SPLITS : 1;
constexpr int AT_ONCE = TURNS < 4 ? TURNS : 4;  // halves of which the merge reads
// Sums of weights of more than this raise the reference.
constexpr float LIMIT = 18446744073709551616.0f;  // 2^64

// threadIdx.x, asked for anew: what follows from it does not lie in registers meanwhile.
DEVICE int find_thread() {
    int x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x;
}

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

// A warp that brings a block's pages, in the order of its halves' turns, each once its place is free.
struct Fetcher {
    const TensorMap *k_map, *v_map;
    const int* numbers;  // of the request's pages
    int first, last;     // the block's first page, and the request's end
    u32 memory, barriers;  // of the first half
    int kv_head, known = 0, next = 0, stage = 0, parity = 1;

    // Its page that this lane looks up of the 32 from `page` on: counted in the block.
    DEVICE int look_up(int page) const {
        const int mine = page + threadIdx.x % 32;
        const int at = first + mine / HALVES * TURNS + mine % HALVES;
        return at < last ? numbers[at] : 0;
    }
    DEVICE void make_barriers() const {
#pragma unroll 1
        for (int i = 0; i < HALVES * STAGES; i++) {
            const u32 full = barriers + i / STAGES * BEHIND_BYTES + i % STAGES * 16;
            barrier_init(full, 1);
            barrier_init(full + 8, 8);  // each warp: once, or twice in one group
        }
        barrier_init_fence();
    }
    // Up to that page of each half.
    DEVICE void bring_until(int end) {
#pragma unroll 1
        for (; next < end && first + next * TURNS < last; next++) {
            if (next > 0 && next * HALVES % 32 == 0) known = look_up(next * HALVES);
#pragma unroll
            for (int h = 0; h < HALVES; h++) {
                if (first + next * TURNS + h >= last) break;
                const int place = __shfl_sync(0xFFFFFFFFu, known, (next * HALVES + h) % 32) * PAGE;
                const u32 to = memory + h * HALF_BYTES + stage * STAGE_BYTES;
                const u32 full = barriers + h * BEHIND_BYTES + stage * 16;
                barrier_wait(full + 8, parity);
                if (threadIdx.x % 32 == 0) {
                    barrier_expect(full, STAGE_BYTES);
#pragma unroll
                    for (int box = 0; box < 2 * BOXES; box++)
                        load_box_once(to + box * BOX_BYTES, box < BOXES ? k_map : v_map, full,
                                      kv_head * D + box % BOXES * 64, place);
                }
                __syncwarp();
            }
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }
    }
    // Once all are asked for, by the fetcher's four warps: values behind those that are seen become 0,
    // for weight 0 of a stale NaN would be NaN. `tail`: keys of the request's last page, 0 if it is
    // full.
    DEVICE void clear_unseen(int tail, u32 cleared) const {
        constexpr int AT_ONCE = 128 / LANES;  // rows
        const int page = last - 1 - first, h = page % TURNS, round = page / TURNS;
        if (tail == 0 || page < 0 || h >= HALVES) return;
        const int thread = threadIdx.x % 128, row = tail + thread / LANES, chunk = thread % LANES;
        const u32 values = memory + h * HALF_BYTES + round % STAGES * STAGE_BYTES + PART_BYTES +
                           chunk / 8 * BOX_BYTES + chunk % 8 * 16;
        barrier_wait(barriers + h * BEHIND_BYTES + round % STAGES * 16, round / STAGES & 1);
#pragma unroll
        for (int i = 0; i < PAGE; i += AT_ONCE)
            if (row + i < PAGE) store4(values + (row + i) * 128, make_uint4(0, 0, 0, 0));
        fence_async();
        __syncwarp();
        if (thread % 32 == 0) barrier_arrive(cleared);
    }
};

// A group of 128 threads: what it reads, and where its pages are.
struct Group {
    u32 stages, barriers, queries;
    u32 totals;  // of its rows: reference and total
    u32 sums;    // of its rows, at the end
    u32 cleared;  // barrier: what is not seen of the last page's values is 0
    int number, pair_id;  // of the group; of its half's barrier
    int left, hidden;  // keys from its half's first page on; of those at first not seen (a window's)
    float scale;

    // Of `width` queries, which are the rows of its products; keys of a page are the columns. Weights
    // stay in registers, and warps wait for nobody. Thread t holds queries t / 4 % 8 + 8 (its warp)
    // and 32 further; of 8 keys each, keys 2 (t % 4) and the next. So of up to 32 queries every
    // thread has one, and weighs half. STEP: see `step_of`.
    template <int STEP, class Last>
    DEVICE void attend(int width, const Last& at_last) const {
        constexpr int STRIDE = STEP * TURNS * PAGE;  // keys from a page of the group to its next
        const int lane = threadIdx.x % 32, t = lane % 4;
        const int query = threadIdx.x / 32 % 4 * 8 + lane / 4;
        const bool both = width > 32;
        float acc[BOXES][32], scores[32], total[2] = {0, 0}, reference[2];
#pragma unroll
        for (int b = 0; b < BOXES; b++)
#pragma unroll
            for (int j = 0; j < 32; j++) acc[b][j] = 0;
        settle(acc);  // not while something is multiplied
        const u32 described_queries = describe(queries);
        const u32 described_keys = describe(stages);
        const u32 described_values = describe(stages + PART_BYTES, BOX_BYTES);
        const auto multiply_page = [&](int stage) {
            const u32 keys = described_keys + stage * (STAGE_BYTES / 16);
#pragma unroll
            for (int k = 0; k < D / 16; k++)
                multiply_keys(scores,
                              with_upper(described_queries + k / 4 * (QUERY_BOX / 16) + k % 4 * 2),
                              with_upper(keys + k / 4 * (BOX_BYTES / 16) + k % 4 * 2), k > 0);
        };
#pragma unroll
        for (int h = 0; h < 2; h++)  // the last threads may have rows that are of nobody
            reference[h] = query + 32 * h < width ? load1(totals + (query + 32 * h) * 8) : 0;
        // The group's next page: its keys from there on and those before, stage and parity.
        const int begin = STEP == 2 ? number : 0;
        int seen = left - begin * TURNS * PAGE, unseen = hidden - begin * TURNS * PAGE;
        int stage = begin, parity = 0;
        const auto hide = [&] {
#pragma unroll
            for (int j = 0; j < 32; j++) {
                const int at = j / 4 * 8 + 2 * t + j % 2;
                if (at >= seen || (HAS_WINDOW && at < unseen)) scores[j] = NEGATIVE_INFINITY;
            }
        };
        if (seen > 0) {
            barrier_wait(barriers + stage * 16, 0);
            wgmma_fence();
            multiply_page(stage);
            wgmma_commit();
            wgmma_wait<0>();
            settle(scores);
        }
        bool is_first = true;
#pragma unroll 1
        while (seen > 0) {
            const bool is_partial = seen < PAGE || (HAS_WINDOW && unseen > 0);
            if (is_partial) hide();
            float sum[2];
            const auto weigh = [&] {
                sum[0] = total[0], sum[1] = total[1];
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    if (h == 1 && !both) break;
#pragma unroll
                    for (int j = 0; j < 32; j++) {
                        if (j / 2 % 2 != h) continue;
                        scores[j] = exp2_fast(scores[j] * scale - reference[h]);
                        sum[h] += scores[j];
                    }
                }
            };
            weigh();
            if (__any_sync(0xFFFFFFFFu, fmaxf(sum[0], sum[1]) > LIMIT)) {
                // seldom: references are raised
                score_again(scores, stages + stage * STAGE_BYTES);
                if (is_partial) hide();
                wgmma_wait<0>();
                settle(acc);
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    float x = reference[h];
#pragma unroll
                    for (int j = 0; j < 32; j++)
                        if (j / 2 % 2 == h) x = fmaxf(x, scores[j] * scale);
                    x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 1));
                    x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 2));
                    const float shrink = exp2_fast(reference[h] - x);
                    total[h] *= shrink;
                    reference[h] = x;
#pragma unroll
                    for (int b = 0; b < BOXES; b++)
#pragma unroll
                        for (int j = 0; j < 32; j++)
                            if (j / 2 % 2 == h) acc[b][j] *= shrink;
                }
                weigh();
            }
            total[0] = sum[0], total[1] = sum[1];
            wgmma_wait<0>();
            settle(acc);
            // of the page before: this warp has read it. There are 8 arrivals of it.
            if (!is_first && lane < STEP)
                barrier_arrive(barriers + (stage + (stage < STEP ? STAGES : 0) - STEP) * 16 + 8);
            is_first = false;
            u32 packed[16];
#pragma unroll
            for (int j = 0; j < 16; j++) packed[j] = pack_bf16(scores[2 * j], scores[2 * j + 1]);
            if (seen < PAGE) barrier_wait(cleared, 0);  // its values that nobody sees
            const u32 values = described_values + stage * (STAGE_BYTES / 16);
            if ((stage += STEP) >= STAGES) stage -= STAGES, parity ^= 1;
            if (seen > STRIDE) barrier_wait(barriers + stage * 16, parity);
            seen -= STRIDE, unseen -= STRIDE;
            wgmma_fence();
            // The scores of the next page along with it; after the last one, of whatever lies there,
            // for nobody, without a branch amid wgmma.
            multiply_page(stage);
            wgmma_commit();
#pragma unroll
            for (int b = 0; b < BOXES; b++)
#pragma unroll
                for (int k = 0; k < 4; k++)  // 16 keys each
                    multiply_weights(acc[b], packed[4 * k], packed[4 * k + 1], packed[4 * k + 2],
                                     packed[4 * k + 3],
                                     with_upper(values + b * (BOX_BYTES / 16) + k * 128), 1);
            wgmma_commit();
            wgmma_wait<1>();
            settle(scores);
        }
        at_last();
        wgmma_wait<0>();
        settle(acc);
        meet(pair_id, HALF);  // every page was read: its place is free
#pragma unroll
        for (int h = 0; h < 2; h++) {
            total[h] += __shfl_xor_sync(0xFFFFFFFFu, total[h], 1);
            total[h] += __shfl_xor_sync(0xFFFFFFFFu, total[h], 2);
            const int row = find_thread() / 32 % 4 * 8 + lane / 4 + 32 * h;
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
};

extern "C" __global__ void __launch_bounds__(ALL_THREADS, 1)
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
    // of a stage: its page has come, it is free
    const u32 barriers = all_behind + half * BEHIND_BYTES;
    const u32 own_scores = all_behind + HALVES * BEHIND_BYTES;
    const u32 kept = own_scores + ROWS * 4;  // the unit, for the end: not in registers
    const u32 cleared = kept + 32;
    const int split = blockIdx.x % SPLITS, turn = split * HALVES + half;
    launch_next();
    const int* const plan = units + (long long)(blockIdx.x / SPLITS) * plan_stride(num_columns);
    Fetcher fetcher = {&k_map, &v_map, plan + 8, split * HALVES, num_columns, memory, all_behind};
    if (warp == FETCHER) {
        if (!HAS_WINDOW) fetcher.known = fetcher.look_up(0);  // with the unit, not after it
        if (lane == 0) {
            prefetch_map(&k_map);
            prefetch_map(&v_map);
            barrier_init(cleared, 4);
            fetcher.make_barriers();
        }
        __syncwarp();
    }
    const Unit unit = *(const Unit*)plan;
    const auto find_own = [&](int first, int kv_head, int query) {
        const int token = first + query / G;
        const long long own = OWN_IS_TOKEN ? token : own_index[token];
        return (own * HKV + kv_head) * D;
    };
    const int first = unit.first, length = unit.length;
    const int tile = unit.tile, kv_head = unit.kv_head;
    const int num_queries = count_queries(unit);
    if (num_queries <= 0) return;  // so it is in the whole cluster: nothing is read or written
    int begin = 0;  // of the keys that are seen
    if (HAS_WINDOW) begin = max(length - window + 1, 0);
    const int first_page = begin / PAGE;
    // from this half's first page on
    const int from = (first_page + turn) * PAGE, hidden = begin - from;
    const int keys = begin < length ? length - from : 0;
    const int step = step_of(num_queries);

    if (warp >= FETCHER) {
        if (HALVES == 2) fewer_registers<24>();
        fetcher.first += first_page;
        fetcher.last = begin < length ? (length + PAGE - 1) / PAGE : 0;
        fetcher.kv_head = kv_head;
        if (warp == FETCHER) {
            if (HAS_WINDOW) fetcher.known = fetcher.look_up(0);
            fetcher.bring_until(EARLY);
            wait_for_previous();
            fetcher.bring_until(SECOND);
            meet(1, THREADS + 32);
            fetcher.bring_until(1 << 30);
        }
        meet(4, 128);
        fetcher.clear_unseen(length % PAGE, cleared);
        return;
    }
    if (HALVES == 2) more_registers<112>();
    if (thread == 0) store_unit(kept, unit);
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
            // of a group's 64 rows warp w multiplies 8 w .. 8 w + 7, then those and 32
            const int there = row & ~63 | row % 32 / 8 * 16 | row % 64 / 32 * 8 | row % 8;
            store4(queries + chunk / 8 * QUERY_BOX + there * 128 + (chunk % 8 ^ row % 8) * 16,
                   query[j]);
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
    meet(1, THREADS + 32);  // queries, references and barriers are there
    // The candidates' own values, which the merge needs: they come while sums are written.
    uint2 own_value[OWN_STEPS][2];
    const auto load_own = [&] {
        const Unit same = load_unit(kept);
        const int total_chunks = count_queries(same) * LANES, mine = find_thread();
#pragma unroll
        for (int j = 0; j < OWN_STEPS; j++) {
            const int i = mine + THREADS * (split + SPLITS * j);
            own_value[j][0] = own_value[j][1] = make_uint2(0, 0);
            if (i >= total_chunks) continue;
            const u16* const from =
                own_v + find_own(same.first, same.kv_head, same.tile * ROWS + i / LANES);
#pragma unroll
            for (int side = 0; side < 2; side++)
                own_value[j][side] =
                    *(const uint2*)(from + side * (D / 2) + i % LANES * 4);
        }
    };
    {
        const int row = step == 1 ? number * GROUP_ROWS : 0;  // the group's first
        const Group group = {stages, barriers, queries + row * 128,
                             barriers + TOTALS + number * GROUP_ROWS * 8,
                             stages + number * GROUP_BYTES, cleared, number, 2 + half,
                             keys, hidden, scale};
        if (step == 1)
            group.attend<1>(min(num_queries - row, GROUP_ROWS), load_own);
        else
            group.attend<2>(num_queries, load_own);
    }
    const Unit same = load_unit(kept);
    const int total_rows = count_queries(same), groups_of_a_row = step_of(total_rows);
    // Of a cluster's halves, and their second groups, only those are read that had a page.
    int turns = TURNS, second_turns = TURNS;
    if (SPLITS > 1) {
        const int pages = same.length > begin ? (same.length + PAGE - 1) / PAGE - begin / PAGE : 0;
        turns = min(pages, TURNS), second_turns = min(max(pages - TURNS, 0), TURNS);
    }
    const int mine = find_thread();
    __syncwarp();
    if (SPLITS > 1) {
        cluster_arrive();
        cluster_wait();
    } else {
        meet(8, THREADS);
    }
    // 4 columns of either half of a row at a time, over all threads of the cluster; the own key comes
    // first
    const auto address_of = [&](u32 place, int s, int half_bytes) {
        const u32 here = place + s % HALVES * half_bytes;
        return SPLITS > 1 ? address_at(here, s / HALVES) : here;
    };
    const auto read4 = [](u32 there) { return SPLITS > 1 ? load4_at(there) : load_shared(there); };
    const auto read2 = [](u32 there) { return SPLITS > 1 ? load2_at(there) : load2(there); };
#pragma unroll
    for (int j = 0; j < OWN_STEPS; j++) {
        const int i = mine + THREADS * (split + SPLITS * j);
        if (i >= total_rows * LANES) break;
        const int row = i / LANES;
        const float own_score = load1(own_scores + row * 4);
        // of each group that had the row, its reference and total
        const auto found = [&](int s, int g) {
            return read2(
                address_of(all_behind + TOTALS + (g * GROUP_ROWS + row) * 8, s, BEHIND_BYTES));
        };
        float most = own_score;
#pragma unroll AT_ONCE
        for (int s = 0; s < turns; s++) {
            most = fmaxf(most, found(s, 0).x);
            if (groups_of_a_row == 2 && s < second_turns) most = fmaxf(most, found(s, 1).x);
        }
        float total = exp2_fast(own_score - most);
        float sums[2][4];
#pragma unroll
        for (int side = 0; side < 2; side++) {
            const uint2 own = own_value[j][side];
            sums[side][0] = low_bf16(own.x) * total, sums[side][1] = high_bf16(own.x) * total;
            sums[side][2] = low_bf16(own.y) * total, sums[side][3] = high_bf16(own.y) * total;
        }
#pragma unroll AT_ONCE
        for (int s = 0; s < turns; s++)
#pragma unroll
            for (int g = 0; g < 2; g++) {
                if (g == groups_of_a_row || (g == 1 && s >= second_turns)) continue;
                const float2 theirs = found(s, g);
                const u32 there = address_of(
                    memory + g * GROUP_BYTES + row * SUM_BYTES + i % LANES * 16, s, HALF_BYTES);
                const float4 a = read4(there), b = read4(there + D * 2);
                const float weight = exp2_fast(theirs.x - most);
                total += theirs.y * weight;
                sums[0][0] += a.x * weight, sums[0][1] += a.y * weight;
                sums[0][2] += a.z * weight, sums[0][3] += a.w * weight;
                sums[1][0] += b.x * weight, sums[1][1] += b.y * weight;
                sums[1][2] += b.z * weight, sums[1][3] += b.w * weight;
            }
        const float norm = 1 / total;
        const long long place = place_of(same.first, same.kv_head, same.tile * ROWS + row);
#pragma unroll
        for (int side = 0; side < 2; side++)
            *(uint2*)(out + place + side * (D / 2) + i % LANES * 4) =
                make_uint2(pack_bf16(sums[side][0] * norm, sums[side][1] * norm),
                           pack_bf16(sums[side][2] * norm, sums[side][3] * norm));
    }
    if (SPLITS > 1) {  // the others may still read what lies here
        __syncwarp();
        cluster_arrive_relaxed();
        cluster_wait();
    }
}
