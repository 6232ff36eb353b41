// The operators, made known to onnxruntime under the names that graphs call them by.
#include "attention.hpp"
#include "compress.hpp"
#include "experts.hpp"
#include "hyper.hpp"
#include "index.hpp"
#include "linear.hpp"
#include "rotate.hpp"
#include "route.hpp"

const ort::Api* ort::api = nullptr;

extern "C" __attribute__((visibility("default"))) ort::Status* RegisterCustomOps(ort::SessionOptions* options,
                                                                                 const ort::ApiBase* base) {
  ort::api = base->get_api(ort::kVersion);
  return ort::guarded([&] {
    static ort::Domain* domain = [] {
      ort::Domain* made = nullptr;
      ort::check(ort::call<ort::Status*>(26, "v4", &made));
      for (const ort::CustomOp* op :
           {ort::op<Linear>(), ort::op<HeadLinear>(), ort::op<MoeExperts>(), ort::op<MoeRoute>(), ort::op<HashRoute>(),
            ort::op<Pointwise<Rounds>>(), ort::op<Pointwise<Adds>>(), ort::op<Pointwise<Gates>>(), ort::op<RmsNorm>(), ort::op<HyperConnection<true>>(),
            ort::op<HyperConnection<false>>(), ort::op<HyperMix>(), ort::op<CompressTokens>(), ort::op<Rotate>(), ort::op<IndexSelect>(),
            ort::op<CandidateSelect>(), ort::op<IndexReselect>(), ort::op<Attention<LatentRows>>(),
            ort::op<Attention<SparseLatentRows>>(), ort::op<Attention<WindowRows>>(), ort::op<Attention<CompressedRows>>(),
            ort::op<Attention<SparseRows>>()})
        ort::check(ort::add(made, op));
      return made;
    }();
    ort::check(ort::call<ort::Status*>(28, options, domain));
  });
}
