// Attention of candidates over their request's prefix, page by page, and themselves.
//
// Definitions: D (head size: 64 or 128), G (query heads of a key head), HKV, STAGES (pages on their
// way), SPLITS (blocks of a cluster), UNITS (of a block: 1 or 2), HAS_WINDOW, OWN_IS_TOKEN;
// multiply_keys and multiply_values.
//
// A unit is up to 128 query rows (candidates x G) of one request and key head. 256 threads of each
// block of a cluster serve it: they take every SPLITS-th page. Two groups of 128 of them compute:
// each 64 rows, or, where there are no more than 64, the same rows over every other page. The first
// warp of a group brings further pages; a warp that does nothing else would take registers from the
// others. What each group found is merged in shared memory, across the cluster, always in the same
// order; there the candidate's own key and value join.
// A block has a multiprocessor to itself. Its two halves of 256 threads serve two units, one of a
// request with many candidates and one of a request with few; they meet at the cluster's barriers
// alone, where every thread of every block arrives twice.
// Warps w, w + 4 ... of a block share a scheduler, so which 16 rows a warp takes is turned around
// in the second half: those that have rows to compute are spread.
// Thread t of a group holds rows t / 4 % 8 + 16 (its warp's block) and 8 further; of 8 columns
// each, columns 2 (t % 4) and the next (wgmma's layout).

constexpr int PAGE = 64;
constexpr int BOX_BYTES = PAGE * 128;  // 64 keys x 64 columns
constexpr int PART_BYTES = D / 64 * BOX_BYTES;  // the keys of a page, or its values
constexpr int STAGE_BYTES = 2 * PART_BYTES;
constexpr int ROWS = 128;
constexpr int THREADS = 256;  // of a unit
// a row of a group's sums; 8 further keep the banks apart
constexpr int SUM_BYTES = (D + 8) * 4;
constexpr int GROUP_BYTES = 64 * SUM_BYTES;
constexpr int BEST = 2 * GROUP_BYTES;  // behind both groups' sums: (maximum, total) of 2 x 64 rows
// Two groups that take alternate pages each have stages of their own: with a shared one, a group that
// is ahead could take the page before for its own, whose barrier has the same parity.
static_assert(STAGES % 2 == 0 && STAGES >= 4, "stages");
static_assert(BEST + 2 * 64 * 8 <= STAGES * STAGE_BYTES, "the merge happens where the pages were");
constexpr int QUERY_BYTES = D * 2;  // a row of queries
constexpr int UNIT_BYTES = STAGES * STAGE_BYTES + ROWS * QUERY_BYTES;  // pages and queries
static_assert(UNIT_BYTES % 1024 == 0, "boxes are aligned to 1024 bytes");
constexpr int BEHIND_BYTES = STAGES * 24 + 32;  // behind those of all units: barriers, the request
constexpr int LANES = D / 8;        // threads of a row, 16 bytes each
constexpr int MAX_RANKED = THREADS;
constexpr int MAX_TILES = 64;  // of a request, where requests are ranked
static_assert((MAX_RANKED + MAX_TILES * 8) * 4 <= ROWS * QUERY_BYTES, "both lie among the queries");
// what a thread merges: 16 bytes of this many rows
constexpr int OWN_STEPS =
    ROWS * LANES > THREADS * SPLITS ? ROWS * LANES / (THREADS * SPLITS) : 1;
// Whether the merge reads all before it computes; else there are too few registers.
constexpr bool READS_FIRST = D == 128 || SPLITS < 8;
// a maximum that grows by less (a factor of 256) is kept: what was summed need not shrink
constexpr float SLACK = 8;

#define NEGATIVE_INFINITY __int_as_float(0xff800000)

DEVICE float max4(float x) {  // of the four lanes that share a row
    x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 2));
}
DEVICE float sum4(float x) {
    x += __shfl_xor_sync(0xFFFFFFFFu, x, 1);
    return x + __shfl_xor_sync(0xFFFFFFFFu, x, 2);
}
DEVICE float dot2(u32 a, u32 b) { return low_bf16(a) * low_bf16(b) + high_bf16(a) * high_bf16(b); }
DEVICE float dot8(uint4 a, uint4 b) {
    return dot2(a.x, b.x) + dot2(a.y, b.y) + (dot2(a.z, b.z) + dot2(a.w, b.w));
}
DEVICE u64 join(u32 low, u32 high) { return (u64)high << 32 | low; }

// Rows of 8 x 16 bytes in shared memory, or 16: a column of 8 rows meets all banks.
DEVICE u32 chunk_at(u32 rows, int row, int chunk) {
    return rows + row * QUERY_BYTES + (chunk ^ row % 8) * 16;
}

// Where the query begins in q and out; `query` counts candidates x G of the request.
DEVICE long long place_of(int first, int kv_head, int query) {
    return ((long long)(first + query / G) * (HKV * G) + kv_head * G + query % G) * D;
}

// What a unit works on.
struct Request {
    int row, first, end, length, table_row;
};
struct Unit {
    Request request;
    int tile, kv_head;
    bool is_paired;  // the block serves two

    // Which of all units it is, in their order; -1: none. Each cluster takes one of the first, and
    // its second half one of the last, as far as they go.
    DEVICE int choose(int num_units, int slots, int half) {
        const int cluster = blockIdx.x / SPLITS;
        if (UNITS == 1) {
            is_paired = false;
            if (cluster >= num_units) return -1;
            const bool reversed = cluster >= slots && num_units <= 2 * slots;
            return reversed ? num_units - 1 - (cluster - slots) : cluster;
        }
        // no more than are needed or have room at once
        const int num_clusters = max((num_units + 1) / 2, min(num_units, slots));
        const int partner = 2 * num_clusters - 1 - cluster;
        is_paired = cluster < num_clusters && partner < num_units;
        if (half == 1) return is_paired ? partner : -1;
        return cluster < num_clusters ? cluster : -1;
    }
};

// Requests in order of their number of candidates, most first; units with rows alone: first tiles
// first, in that order. Called by all threads of a unit, that meet at `id`; `keys` and `found` are
// places in shared memory.
DEVICE Unit find_unit(int half, const int* rows, const int* lengths, const int* firsts,
                      int num_rows, int num_tiles, int slots, u32* keys, Request* found, int id) {
    const int row = threadIdx.x % THREADS;
    Request mine = {row, 0, 0, 0, 0};
    u32 key = 0;
    if (row < num_rows) {
        mine = {row, firsts[row], firsts[row + 1], lengths[row], rows[row]};
        key = (u32)(mine.end - mine.first) << 8 | (MAX_RANKED - 1 - row);
    }
    keys[row] = key;
    u32* const counts = keys + MAX_RANKED;  // of each tile, by each warp: requests that have it
    for (int t = 0; t < num_tiles; t++) {
        const u32 have = __ballot_sync(0xFFFFFFFFu, (mine.end - mine.first) * G > t * ROWS);
        if (row % 32 == 0) counts[t * 8 + row / 32] = __popc(have);
    }
    meet(id, THREADS);
    const auto units_of_tile = [&](int t) {
        const uint4 a = ((const uint4*)counts)[2 * t], b = ((const uint4*)counts)[2 * t + 1];
        return (int)(a.x + a.y + a.z + a.w + (b.x + b.y + b.z + b.w)) * HKV;
    };
    Unit unit = {};
    int num_units = 0;
    for (int t = 0; t < num_tiles; t++) num_units += units_of_tile(t);
    int place = unit.choose(num_units, slots, half);
    if (place < 0) return unit;
    for (int here; place >= (here = units_of_tile(unit.tile)); unit.tile++) place -= here;
    unit.kv_head = place % HKV;
    if (row < num_rows) {
        int above = 0;
#pragma unroll 4
        for (int i = 0; i < (num_rows + 3) / 4; i++) {
            const uint4 four = ((const uint4*)keys)[i];
            above += (four.x > key) + (four.y > key) + (four.z > key) + (four.w > key);
        }
        if (above == place / HKV) *found = mine;
    }
    meet(id, THREADS);
    unit.request = *found;
    return unit;
}

// The pages of a unit's part, by a warp that knows the numbers of 32 of them at a time.
struct Pages {
    const TensorMap *k_map, *v_map;
    const int* table;  // of this part's first page; the others follow SPLITS apart
    int count, known;
    u32 stages, barriers;

    DEVICE int look_up(int i) const { return i < count ? table[i * SPLITS] : 0; }
    DEVICE void open(int lane) { known = look_up(lane); }
    // i: in order, a page or two at a time
    DEVICE void bring(int i, int last, int stage, int kv_head, int lane) {
        if (i / 32 != last / 32) known = look_up(i / 32 * 32 + lane);
        const int place = __shfl_sync(0xFFFFFFFFu, known, i % 32) * PAGE;
        const u32 to = stages + stage * STAGE_BYTES, full = barriers + stage * 24;
        if (lane == 0) {
            barrier_expect(full, PART_BYTES);
#pragma unroll
            for (int box = 0; box < D / 64; box++)
                load_box(to + box * BOX_BYTES, k_map, full, kv_head * D + box * 64, place);
            barrier_expect(full + 8, PART_BYTES);
#pragma unroll
            for (int box = 0; box < D / 64; box++)
                load_box(to + PART_BYTES + box * BOX_BYTES, v_map, full + 8,
                         kv_head * D + box * 64, place);
        }
        __syncwarp();
    }
};

extern "C" __global__ void __launch_bounds__(UNITS * THREADS, 1)
    run(const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map,
        const u16* q, const u16* own_k, const u16* own_v, const long long* own_index,
        const int* table, const int* rows, const int* lengths, const int* firsts, u16* out,
        float scale, int window, int num_columns, int num_rows, int num_tiles, int slots) {
    extern __shared__ __align__(1024) u8 dynamic[];
    // one value for the whole warp, which the compiler should know
    const int block_warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const int half = UNITS == 2 ? block_warp / 8 : 0;
    const int warp = block_warp % 8, thread = threadIdx.x % THREADS;
    const int all_meet = 1 + half;  // barriers' numbers: of the half, of its first group
    const int groups_meet = 3 + 2 * half;
    u8* const mine = dynamic + half * UNIT_BYTES;
    u8* const behind = dynamic + UNITS * UNIT_BYTES + half * BEHIND_BYTES;
    const u32 stages = shared_address(mine);
    // The upper byte of an address is the block's number in its cluster, and no part of descriptors.
    const u32 described_keys = (stages & 0x3FFFF) >> 4 | 1 << 16;
    const u32 described_values =
        ((stages & 0x3FFFF) + PART_BYTES) >> 4 | BOX_BYTES / 16 << 16;
    const u32 query_rows = stages + STAGES * STAGE_BYTES;
    // of a stage: its keys have come, its values have come, it is free
    const u32 barriers = shared_address(behind);
    const int split = blockIdx.x % SPLITS;
    launch_next();
    if (thread == 0) {
        prefetch_map(&k_map);
        prefetch_map(&v_map);
        for (int i = 0; i < STAGES; i++) {
            barrier_init(barriers + i * 24, 1);
            barrier_init(barriers + i * 24 + 8, 1);
            barrier_init(barriers + i * 24 + 16, 8);  // warps
        }
        barrier_init_fence();
    }
    Unit unit = {};
    if (num_rows > 1 && num_rows <= MAX_RANKED && num_tiles <= MAX_TILES) {
        unit = find_unit(half, rows, lengths, firsts, num_rows, num_tiles, slots,
                         (u32*)(mine + STAGES * STAGE_BYTES), (Request*)(behind + STAGES * 24),
                         all_meet);
    } else {
        const int place = unit.choose(num_tiles * num_rows * HKV, slots, half);
        if (place >= 0) {
            const int row = place / HKV % num_rows;
            unit.tile = place / HKV / num_rows;
            unit.kv_head = place % HKV;
            unit.request = {row, firsts[row], firsts[row + 1], lengths[row], rows[row]};
        }
        meet(all_meet, THREADS);
    }
    const int first = unit.request.first, end = unit.request.end, length = unit.request.length;
    const int table_row = unit.request.table_row, tile = unit.tile, kv_head = unit.kv_head;
    const bool is_paired = unit.is_paired;
    const int num_queries = min((end - first) * G - tile * ROWS, ROWS);
    if (num_queries <= 0) {  // so it is in the whole cluster, but in this half alone
        wait_for_previous();
        if (UNITS == 2 && SPLITS > 1) {
#pragma unroll 1
            for (int i = 0; i < 2; i++) {  // as the other half
                cluster_arrive_relaxed();
                cluster_wait();
            }
        }
        return;
    }
    int begin = 0;
    if (HAS_WINDOW) begin = max(length - window + 1, 0);
    const int first_page = begin / PAGE + split;
    const int last_page = begin < length ? (length + PAGE - 1) / PAGE : 0;
    const int count = first_page < last_page ? (last_page - first_page - 1) / SPLITS + 1 : 0;
    const bool alternate = num_queries <= 64;

    Pages pages;
    if (warp % 4 == 0) {
        pages = {&k_map, &v_map, table + (long long)table_row * num_columns + first_page, count, 0,
                 stages, barriers};
        pages.open(lane);
        for (int i = 0; i < min(count, STAGES); i++)
            if (warp == 0) pages.bring(i, i, i, kv_head, lane);
    }
    const int total_chunks = num_queries * LANES;
    uint4 own_query[OWN_STEPS], own_key[OWN_STEPS], own_value[OWN_STEPS];
    {
        const int group = warp / 4;
        const int turn = is_paired ? 3 * half : alternate ? 2 * group : 0;
        const int block = __shfl_sync(0xFFFFFFFFu, warp % 4 ^ turn, 0);
        const int base = (alternate ? 0 : 64 * group) + block * 16;  // of the warp, in the tile
        const bool is_used = base < num_queries;
        u32 queries[D / 16][4];
        float acc[D / 2];
        float best[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY}, total[2] = {0, 0};
#pragma unroll
        for (int j = 0; j < D / 2; j++) acc[j] = 0;
        wait_for_previous();
        {
            const u32 own_rows = query_rows + warp * 16 * QUERY_BYTES;
            uint4 read[LANES / 2];  // 32 / LANES rows at a time
#pragma unroll
            for (int j = 0; j < LANES / 2; j++) {
                const int query = base + j * (32 / LANES) + lane / LANES;
                read[j] = make_uint4(0, 0, 0, 0);
                if (query < num_queries)
                    read[j] = *(const uint4*)(q + place_of(first, kv_head, tile * ROWS + query) +
                                              lane % LANES * 8);
            }
#pragma unroll
            for (int j = 0; j < LANES / 2; j++)
                store4(chunk_at(own_rows, j * (32 / LANES) + lane / LANES, lane % LANES), read[j]);
            __syncwarp();
#pragma unroll
            for (int j = 0; j < D / 16; j++)
                load_matrices(queries[j], chunk_at(own_rows, lane % 16, 2 * j + lane / 16));
        }

        const int step = alternate ? 2 : 1;
        const u32 times = step;  // what the other group does not read it does not free
        int i = alternate ? group : 0, stage = i, parity = 0;
        const bool brings = warp % 4 == 0 && (alternate || group == 0);
        float scores[32];
        float shrink[2];
        u32 weights[4][4];  // of rows that are not real: anything, nobody reads their sums
        // From scores of the page that begins at position `from` to weights, still fp32; says
        // whether `acc` must `shrink`, which nothing else touches here.
        const auto weigh = [&](int from) {
            if (from + PAGE > length || (HAS_WINDOW && from < begin)) {
#pragma unroll
                for (int j = 0; j < 32; j++) {
                    const int at = from + j / 4 * 8 + lane % 4 * 2 + j % 2;
                    const bool seen = at < length && (!HAS_WINDOW || at >= begin);
                    scores[j] = seen ? scores[j] : NEGATIVE_INFINITY;
                }
            }
            float now[2];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float most = scores[2 * h];
#pragma unroll
                for (int j = 0; j < 8; j++)
                    most = fmaxf(most, fmaxf(scores[4 * j + 2 * h], scores[4 * j + 2 * h + 1]));
                // a page has a key that is seen: never minus infinity
                now[h] = max4(most) * scale;
                if (now[h] <= best[h] + SLACK) now[h] = best[h];
            }
            const bool grows =
                __any_sync(0xFFFFFFFFu, now[0] != best[0] || now[1] != best[1]);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                shrink[h] = exp2_fast(best[h] - now[h]);
                best[h] = now[h];
                float sum = 0;
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    float &a = scores[4 * j + 2 * h], &b = scores[4 * j + 2 * h + 1];
                    a = exp2_fast(a * scale - best[h]);
                    b = exp2_fast(b * scale - best[h]);
                    sum += a + b;
                }
                total[h] = total[h] * shrink[h] + sum;
            }
            return grows;
        };
        const auto pack = [&] {
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int h = 0; h < 2; h++)
                    weights[j / 2][j % 2 * 2 + h] =
                        pack_bf16(scores[4 * j + 2 * h], scores[4 * j + 2 * h + 1]);
        };
        if (i < count) {
            const u32 keys = stages + stage * STAGE_BYTES;
            barrier_wait(barriers + stage * 24, 0);
            wgmma_fence();
#pragma unroll
            for (int j = 0; j < D / 16; j++)
                multiply_keys(scores, queries[j],
                              describe(keys + j / 4 * BOX_BYTES) + j % 4 * 2, j > 0);
            wgmma_commit();
            wgmma_wait<0>();
            settle(scores);
            if (is_used) {
                weigh((first_page + i * SPLITS) * PAGE);
                pack();
            }
        }
        for (; i < count; i += step) {
            const u32 values = stages + stage * STAGE_BYTES + PART_BYTES;
            const int from = (first_page + i * SPLITS) * PAGE;  // position of the first key
            const int further = i - step + STAGES;  // in place of the page before
            if (brings && i >= step && further < count) {
                const int wrapped = stage < step, emptied = stage - step + wrapped * STAGES;
                barrier_wait(barriers + emptied * 24 + 16, parity ^ wrapped);
                pages.bring(further, max(further - step, 0), emptied, kv_head, lane);
            }
            barrier_wait(barriers + stage * 24 + 8, parity);
            if (from + PAGE > length) {  // weight 0 of a stale NaN would be NaN
                const int seen = length - from;
#pragma unroll 1
                for (int j = threadIdx.x % 128; j < (PAGE - seen) * (D / 8); j += 128) {
                    const int box = D == 64 ? 0 : j / 8 % 2;
                    const int key = seen + (D == 64 ? j / 8 : j / 16);
                    const u32 to = values + box * BOX_BYTES + key * 128 + j % 8 * 16;
                    store2(to, 0, 0);
                    store2(to + 8, 0, 0);
                }
                fence_async();
                meet(groups_meet + group, 128);
            }
            const u32 is_free = barriers + stage * 24 + 16;
            const int last_stage = stage;
            stage += step;
            if (stage >= STAGES) stage -= STAGES, parity ^= 1;
            // the scores of the next page along with it; after the last one,
            // of whatever lies there, for nobody, without a branch amid wgmma
            const bool goes_on = i + step < count;
            if (goes_on) barrier_wait(barriers + stage * 24, parity);
            // the lower halves of the descriptors, see `describe`
            const u32 key_rows = described_keys + stage * (STAGE_BYTES / 16);
            const u32 value_rows = described_values + last_stage * (STAGE_BYTES / 16);
            wgmma_fence();
#pragma unroll
            for (int j = 0; j < D / 16; j++)
                multiply_keys(scores, queries[j],
                              join(key_rows + j / 4 * (BOX_BYTES / 16) + j % 4 * 2, 1 << 30 | 64),
                              j > 0);
            wgmma_commit();
#pragma unroll
            for (int j = 0; j < 4; j++)  // 16 keys each
                multiply_values(acc, weights[j], join(value_rows + j * 128, 1 << 30 | 64), 1);
            wgmma_commit();
            wgmma_wait<1>();
            settle(scores);
            // while the values are still multiplied: what touches neither `acc` nor `weights`
            bool grows = false;
            if (goes_on && is_used) grows = weigh(from + step * SPLITS * PAGE);
            wgmma_wait<0>();
            settle(scores);
            settle(acc);
            if (lane == 0) barrier_arrive_times(is_free, times);
            if (goes_on && is_used) {
                if (grows) {
#pragma unroll
                    for (int j = 0; j < D / 2; j++) acc[j] *= shrink[j / 2 % 2];
                }
                pack();
            }
        }

        // for the merge, while the others end
#pragma unroll
        for (int j = 0; j < OWN_STEPS; j++) {
            const int i = thread + THREADS * (split + SPLITS * j);
            own_query[j] = own_key[j] = own_value[j] = make_uint4(0, 0, 0, 0);
            if (i < total_chunks) {
                const int query = tile * ROWS + i / LANES, token = first + query / G;
                const long long own = OWN_IS_TOKEN ? token : own_index[token];
                const long long at = (own * HKV + kv_head) * D + i % LANES * 8;
                own_query[j] =
                    *(const uint4*)(q + place_of(first, kv_head, query) + i % LANES * 8);
                own_key[j] = *(const uint4*)(own_k + at);
                own_value[j] = *(const uint4*)(own_v + at);
            }
        }
        meet(all_meet, THREADS);  // every page was read: its place is free
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int local = block * 16 + lane / 4 + 8 * h;
            const u32 to = stages + group * GROUP_BYTES + local * SUM_BYTES + lane % 4 * 8;
            const float sum = sum4(total[h]);
            if (is_used) {
#pragma unroll
                for (int j = 0; j < D / 8; j++)
                    store2(to + j * 32, acc[4 * j + 2 * h], acc[4 * j + 2 * h + 1]);
                if (lane % 4 == 0)
                    store2(stages + BEST + (group * 64 + local) * 8, best[h], sum);
            }
        }
    }

    __syncwarp();
    if (SPLITS > 1) cluster_arrive();
    float own_score[OWN_STEPS];
#pragma unroll
    for (int j = 0; j < OWN_STEPS; j++) {
        float sum = dot8(own_query[j], own_key[j]);
#pragma unroll
        for (int other = LANES / 2; other > 0; other /= 2)
            sum += __shfl_xor_sync(0xFFFFFFFFu, sum, other);
        own_score[j] = sum * scale;
    }
    if (SPLITS > 1)
        cluster_wait();
    else
        meet(all_meet, THREADS);
    // 8 columns of a row at a time, over all threads of the cluster; the own key comes first
    float2 found[OWN_STEPS][SPLITS][2];
    float4 parts[OWN_STEPS][SPLITS][2][2];
    const auto read_parts = [&](float4 (&to)[2], int i, int s, int g) {
        const int row = i / LANES, column = i % LANES * 8;
        const u32 there = address_at(stages + (row / 64 + g) * GROUP_BYTES + row % 64 * SUM_BYTES +
                                         column * 4, s);
        to[0] = load4_at(there);
        to[1] = load4_at(there + 16);
    };
#pragma unroll
    for (int step = 0; step < OWN_STEPS; step++) {
        const int i = thread + THREADS * (split + SPLITS * step);
#pragma unroll
        for (int s = 0; s < SPLITS; s++)
#pragma unroll
            for (int g = 0; g < 2; g++) {
                found[step][s][g] = make_float2(NEGATIVE_INFINITY, 0);
                if (i < total_chunks && (g == 0 || alternate))
                    found[step][s][g] =
                        load2_at(address_at(stages + BEST + (i / LANES + g * 64) * 8, s));
            }
#pragma unroll
        for (int s = 0; s < SPLITS; s++)
#pragma unroll
            for (int g = 0; g < 2; g++)
                if (READS_FIRST && i < total_chunks && (g == 0 || alternate))
                    read_parts(parts[step][s][g], i, s, g);
    }
#pragma unroll
    for (int step = 0; step < OWN_STEPS; step++) {
        const int i = thread + THREADS * (split + SPLITS * step);
        if (i >= total_chunks) break;
        float most = own_score[step];
#pragma unroll
        for (int s = 0; s < SPLITS; s++)
#pragma unroll
            for (int g = 0; g < 2; g++) most = fmaxf(most, found[step][s][g].x);
        float total = exp2_fast(own_score[step] - most);
        const uint4 own = own_value[step];
        float sums[8] = {low_bf16(own.x) * total, high_bf16(own.x) * total,
                         low_bf16(own.y) * total, high_bf16(own.y) * total,
                         low_bf16(own.z) * total, high_bf16(own.z) * total,
                         low_bf16(own.w) * total, high_bf16(own.w) * total};
#pragma unroll
        for (int s = 0; s < SPLITS; s++)
#pragma unroll
            for (int g = 0; g < 2; g++)
                if (g == 0 || alternate) {
                    const float weight = exp2_fast(found[step][s][g].x - most);
                    if (!READS_FIRST) read_parts(parts[step][s][g], i, s, g);
                    const float4 a = parts[step][s][g][0], b = parts[step][s][g][1];
                    total += found[step][s][g].y * weight;
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
