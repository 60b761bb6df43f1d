// What calls will read next. Steps are alike, so what followed a call the last time is expected to follow it again; of a
// mixture, the experts that its router has chosen.
//
// Knows addresses only. If it is wrong, somebody fetches what nobody needs.
#pragma once
#include <unordered_map>
#include <vector>

#include "home.h"

namespace shoal {

class Foresight {
public:
    // A call begins that reads weights, at `weights` first. → what each thread reads first, to be filled in.
    Coming* reads(const void* weights, int threads) {
        if (after_.size() + experts_.size() > MOST_KNOWN) after_.clear(), experts_.clear();
        choosing_ = false;
        std::vector<Coming>& coming = after_[last_];
        coming.resize((size_t)threads);
        last_ = weights;
        return coming.data();
    }

    // The router that was read last has chosen these.
    void chose(const int64_t* experts, int64_t count) {
        chosen_.assign(experts, experts + count);
        choosing_ = count > 0;
    }

    // All of the chosen ones are computed now, and the i-th is here: what a thread reads that computes it alone.
    void met(int64_t i, int64_t count, const Coming& whole) {
        choosing_ = false;
        if (count == (int64_t)chosen_.size()) experts_[expert(i)] = whole;
    }

    // Calls `give(thread, coming)` with what each thread but the first, which is elsewhere, is expected to read first after
    // the call.
    template <class Give>
    void next(int threads, Give give) const {
        if (choosing_) {
            for (int i = 1; i < threads; i++) give(i, share(i, threads));
        } else if (const auto found = after_.find(last_); found != after_.end()) {
            for (int i = 1; i < threads && i < (int)found->second.size(); i++) give(i, found->second[(size_t)i]);
        }
    }

private:
    static constexpr size_t MOST_KNOWN = 1 << 16;

    // Of the chosen experts, whose rows follow each other.
    Coming share(int thread, int threads) const {
        const int64_t at = (int64_t)chosen_.size() * thread;  // in parts of an expert
        const auto found = experts_.find(expert(at / threads));
        if (found == experts_.end()) return {};
        Coming coming = found->second;
        const int64_t before = coming.bytes / threads * (at % threads);
        for (const char*& start : coming.at) start = start ? start + before : start;
        coming.bytes -= before;
        return coming;
    }

    // Where the i-th of the chosen experts is in `experts_`: by an address in its router, which no other expert has.
    const void* expert(int64_t i) const { return static_cast<const char*>(last_) + chosen_[(size_t)i]; }

    std::unordered_map<const void*, std::vector<Coming>> after_;  // weights that were read
    std::unordered_map<const void*, Coming> experts_;
    std::vector<int64_t> chosen_;
    bool choosing_ = false;  // experts are chosen, but not yet computed
    const void* last_ = nullptr;
};

}  // namespace shoal
