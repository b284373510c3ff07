#pragma once

// Saved state of one sequence. Nothing of other sequences and of removed tokens is in it:
//
//   pages  of which at least half is the sequence's own and the rest is free move byte for byte. Rows of them that are
//          exact in the cache (window, sink tokens) are wiped from the page and follow as rows.
//   rows   everything else, as f16: exact rows, and decoded rows of pages with cells that are another sequence's (or
//          that its window has left). They are stored anew, as if they were a ubatch, side by side in pages that become
//          all its own.
//   pool   members (outlier tokens) that are in those pages.
//
// Payload: number of pages and of further cells; cells of pages, each behind what the page has of it, packed ones with
// how far they have moved since they were encoded; the further cells; per layer K and V: pages and pool; per layer: rows
// of K and V, of exact cells of pages and of further cells.
//
// kvq-state-seq-write.cpp chooses and writes; kvq-state-seq-read.cpp reads into memory of its own and checks,
// kvq-state-seq-place.cpp says where everything goes, and kvq-state-seq-restore.cpp puts it there.

#include "kvq-state.h"

#include <vector>

constexpr uint32_t NO_PAGE = UINT32_MAX;

// what a state has of a cell
enum saved_as : uint8_t {
    SAVED_NOT, // of pages: free when they were saved
    SAVED_PACKED,
    SAVED_EXACT,
};

// a saved sequence on its way into the cache
struct kvq_state_seq {
    uint32_t page;
    uint32_t n_pages;

    std::vector<kvq_state_cell> cells;  // of pages, then the others; where they go once they are placed
    std::vector<uint8_t>        as;     // as cells: saved_as
    std::vector<int32_t>        turned; // of the cells of pages

    // whether a row comes with its page
    bool with_page(size_t i) const {
        return as[i] == SAVED_PACKED && targets[i/page] != NO_PAGE;
    }

    std::vector<kvq::layout>       layouts; // of just these pages, by layer
    std::vector<kvq_state_memory>     memory;  // as layouts
    std::vector<std::vector<uint8_t>> rows;    // by layer: f16 [n_exact][K, V]

    std::vector<uint32_t> targets; // a page of the cache for each page; none: its rows are stored anew
};

enum kvq_cell_use : uint8_t {
    CELL_FREE,  // empty, or the sequence's own: the restore replaces it
    CELL_LEFT,  // of another sequence, whose window has left it: llama.cpp takes such cells as well
    CELL_TAKEN,
};

// Gives the pages and cells of a sequence places, whole free pages first. False where llama.cpp finds no room either.
bool kvq_state_place(const std::vector<kvq_cell_use> & use, kvq_state_seq & saved);
