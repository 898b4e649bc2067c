// Which cluster of `attention.cu` has which unit, found once for all layers of a step.
//
// Definitions: G (query heads of a key head), HKV, ROWS (query rows of a unit at most: a tile of a
// request's candidates x G), MAX_RANKED and MAX_TILES (requests, and tiles of one, that are ranked).
//
// Block b writes the unit of cluster b. Requests come in order of their number of candidates, most
// first, and units with rows alone: first tiles first, in that order.

// Of all units, in their order, that of a cluster; -1: none. Where there are two for each slot at
// most, those with few rows come after those with many.
DEVICE int choose(int num_units, int slots, int cluster) {
    if (cluster >= num_units) return -1;
    const bool reversed = cluster >= slots && num_units <= 2 * slots;
    return reversed ? num_units - 1 - (cluster - slots) : cluster;
}

extern "C" __global__ void __launch_bounds__(MAX_RANKED)
    run(const int* table, const int* rows, const int* lengths, const int* firsts, int* units,
        int num_columns, int num_rows, int num_tiles, int slots) {
    launch_next();  // what comes before the first layer reads nothing of it
    __shared__ uint4 shared[(MAX_RANKED + MAX_TILES * 8) / 4];
    __shared__ int chosen;
    u32* const keys = (u32*)shared;
    u32* const counts = keys + MAX_RANKED;  // of each tile, by each warp: requests that have it
    const int cluster = blockIdx.x, mine = threadIdx.x;
    Unit unit = {};
    int row = -1;
    if (num_rows > 1 && num_rows <= MAX_RANKED && num_tiles <= MAX_TILES) {
        const int own = mine < num_rows ? firsts[mine + 1] - firsts[mine] : 0;
        const u32 key = (u32)own << 8 | (MAX_RANKED - 1 - mine);
        keys[mine] = mine < num_rows ? key : 0;
        for (int t = 0; t < num_tiles; t++) {
            const u32 have = __ballot_sync(0xFFFFFFFFu, own * G > t * ROWS);
            if (mine % 32 == 0) counts[t * 8 + mine / 32] = __popc(have);
        }
        __syncthreads();
        const auto units_of_tile = [&](int t) {
            const uint4 a = ((const uint4*)counts)[2 * t], b = ((const uint4*)counts)[2 * t + 1];
            return (int)(a.x + a.y + a.z + a.w + (b.x + b.y + b.z + b.w)) * HKV;
        };
        int num_units = 0;
        for (int t = 0; t < num_tiles; t++) num_units += units_of_tile(t);
        int place = choose(num_units, slots, cluster);
        if (place >= 0) {
            for (int here; place >= (here = units_of_tile(unit.tile)); unit.tile++) place -= here;
            unit.kv_head = place % HKV;
            if (mine < num_rows) {
                int above = 0;
#pragma unroll 4
                for (int i = 0; i < (num_rows + 3) / 4; i++) {
                    const uint4 four = ((const uint4*)keys)[i];
                    above += (four.x > key) + (four.y > key) + (four.z > key) + (four.w > key);
                }
                if (above == place / HKV) chosen = mine;
            }
            __syncthreads();
            row = chosen;
        }
    } else {
        const int place = choose(num_tiles * num_rows * HKV, slots, cluster);
        if (place >= 0) {
            row = place / HKV % num_rows;
            unit.tile = place / HKV / num_rows;
            unit.kv_head = place % HKV;
        }
    }
    int* const to = units + (long long)cluster * plan_stride(num_columns);
    if (row >= 0) {
        unit.first = firsts[row], unit.end = firsts[row + 1], unit.length = lengths[row];
        const int* const from = table + (long long)rows[row] * num_columns;
        for (int i = mine; i < num_columns; i += MAX_RANKED) to[8 + i] = from[i];
    }
    if (mine == 0) *(Unit*)to = unit;
}
