// kvq.h for C++17: objects that free themselves, failures as exceptions. Everything else is called as in C.
//
//     kvq::recipe recipe;
//     kvq::check(kvq_recipe_parse("on", kvq::out(recipe)));
//     kvq_recipe_window(recipe.get());
#ifndef KVQ_HPP
#define KVQ_HPP

#include <memory>
#include <stdexcept>

#include "kvq.h"

namespace kvq {

struct deleter {
    void operator()(kvq_cache *p) const noexcept { kvq_cache_free(p); }
    void operator()(kvq_calibration *p) const noexcept { kvq_calibration_free(p); }
    void operator()(kvq_device *p) const noexcept { kvq_device_free(p); }
    void operator()(kvq_layout *p) const noexcept { kvq_layout_free(p); }
    void operator()(kvq_planner *p) const noexcept { kvq_planner_free(p); }
    void operator()(kvq_profile *p) const noexcept { kvq_profile_free(p); }
    void operator()(kvq_recipe *p) const noexcept { kvq_recipe_free(p); }
    void operator()(kvq_rotation *p) const noexcept { kvq_rotation_free(p); }
    void operator()(kvq_shift *p) const noexcept { kvq_shift_free(p); }
};

template <typename T> using handle = std::unique_ptr<T, deleter>;

using cache = handle<kvq_cache>;
using calibration = handle<kvq_calibration>;
using device = handle<kvq_device>;
using layout = handle<kvq_layout>;
using planner = handle<kvq_planner>;
using profile = handle<kvq_profile>;
using recipe = handle<kvq_recipe>;
using rotation = handle<kvq_rotation>;
using shift = handle<kvq_shift>;

// What kvq_last_error() said in this thread, and the status.
class error : public std::runtime_error {
public:
    explicit error(kvq_status status) : std::runtime_error(kvq_last_error()), status_(status) {}
    kvq_status status() const noexcept { return status_; }

private:
    kvq_status status_;
};

inline void check(kvq_status status) {
    if (status != KVQ_STATUS_OK) throw error(status);
}

// A handle as the last argument of a _new or _parse function. If that fails, the handle keeps what it has.
template <typename T> class out {
public:
    explicit out(handle<T> &to) noexcept : to_(to) {}
    ~out() {
        if (made_) to_.reset(made_);
    }
    out(const out &) = delete;
    out &operator=(const out &) = delete;
    operator T **() noexcept { return &made_; }

private:
    handle<T> &to_;
    T *made_ = nullptr;
};

} // namespace kvq

#endif
