// The store node of a layer while a model is calibrated.

#include "kvq-observe.h"
#include "kvq-glue.h"

#include "llama-impl.h"

#include <atomic>
#include <cstring>

static std::atomic<llama_kvq_observer *> current = { nullptr };

void llama_kvq_observe(llama_kvq_observer * observer) {
    current = observer;
}

kvq_profile_info llama_kvq_identity(const llama_model * model) {
    return kvq_profile_identity(*model);
}

void llama_kvq_profile_write(const std::string & path, const kvq_profile_info & info, const kvq_profile * profile,
        const std::map<uint32_t, kvq_profile_of_layer> & layers) {
    kvq_profile_write(path, info, profile, layers);
}

bool kvq_observe_store(const ggml_tensor * dst, const float * lse, const llama_kvq_node & node, int ith, int nth) {
    llama_kvq_observer * observer = current;
    if (!observer) {
        return false;
    }
    const ggml_tensor * k    = dst->src[3];
    const ggml_tensor * v    = dst->src[4];
    const ggml_tensor * q    = dst->src[5];
    const ggml_tensor * out  = dst->src[6];
    const ggml_tensor * mask = (out->src[3] ? out : out->src[0])->src[3]; // of the attend node

    if (node.max_bias != 0.0f) {
        observer->refuse("this model adds ALiBi to its scores: it cannot be calibrated");
        return true;
    }
    GGML_ASSERT(dst->src[2]->ne[2] == 1 && mask->ne[0] >= k->ne[2]);

    kvq_calibration_args args;
    memset(&args, 0, sizeof(args));

    args.q                 = (const float *) q->data;
    args.q_stride_token    = q->nb[2]/sizeof(float);
    args.q_stride_head     = q->nb[1]/sizeof(float);
    args.k                 = (const float *) k->data;
    args.k_stride_token    = k->nb[2]/sizeof(float);
    args.k_stride_head     = k->nb[1]/sizeof(float);
    args.v                 = (const float *) v->data;
    args.v_stride_token    = v->nb[2]/sizeof(float);
    args.v_stride_head     = v->nb[1]/sizeof(float);
    args.out               = (const float *) out->data;
    args.lse               = lse;
    args.mask              = mask->data;
    args.mask_stride_token = mask->nb[1]/mask->nb[0];
    args.mask_is_f16       = mask->type == GGML_TYPE_F16;
    args.scale             = node.scale;
    args.softcap           = node.softcap;
    args.n_tokens          = k->ne[2];

    const kvq_shape shape = { (uint32_t) q->ne[1], (uint32_t) k->ne[1], (uint32_t) k->ne[0], (uint32_t) v->ne[0] };

    observer->observe(node.il, shape, node.rotation->get(), args, ith, nth);

    return true;
}
