// The runtime as a Python module. Every structure is made from keyword arguments named as its
// fields; a pointer is an integer, as `Tensor.data_ptr()` gives it, and None is null. Whoever makes
// a structure keeps the memory that it points to alive.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <type_traits>

#include "runtime/decode.h"

namespace py = pybind11;

namespace he::runtime {
namespace {

// Moves keyword arguments into fields; a name that no field has is a TypeError.
class Fields {
 public:
  explicit Fields(const py::kwargs& arguments) : left_(arguments) {}

  template <typename T>
  Fields& operator()(const char* name, T& field) {
    if (!left_.contains(name)) return *this;
    const py::object value = left_.attr("pop")(name);
    if (value.is_none()) return *this;
    if constexpr (std::is_pointer_v<T>) {
      field = reinterpret_cast<T>(value.cast<uintptr_t>());
    } else if constexpr (std::is_enum_v<T>) {
      field = static_cast<T>(value.cast<int>());
    } else {
      field = value.cast<T>();
    }
    return *this;
  }

  void done() const {
    for (const auto& item : left_) {
      throw py::type_error("no field is called " + item.first.cast<std::string>());
    }
  }

 private:
  py::kwargs left_;
};

// A Python class whose constructor fills `Struct` by visit(fields, struct).
template <typename Struct, typename Visit>
void structure(py::module_& module, const char* name, const Visit& visit) {
  py::class_<Struct>(module, name).def(py::init([visit](const py::kwargs& arguments) {
    Struct made;
    Fields fields(arguments);
    visit(fields, made);
    fields.done();
    return made;
  }));
}

void define_weights(py::module_& m) {
  structure<NormWeights>(m, "NormWeights", [](Fields& f, NormWeights& w) {
    f("weight", w.weight)("bias", w.bias)("eps", w.eps);
  });
  structure<AdapterWeights>(m, "AdapterWeights", [](Fields& f, AdapterWeights& w) {
    f("a", w.a)("b", w.b)("rank", w.rank)("scale", w.scale);
  });
  structure<LinearWeights>(m, "LinearWeights", [](Fields& f, LinearWeights& w) {
    f("weight", w.weight)("bias", w.bias)("out_dim", w.out_dim)("in_dim", w.in_dim);
    f("transposed", w.transposed)("adapters", w.adapters);
  });
  structure<LayerWeights>(m, "LayerWeights", [](Fields& f, LayerWeights& w) {
    f("attention_norm", w.attention_norm)("attention_output_norm", w.attention_output_norm);
    f("mlp_norm", w.mlp_norm)("mlp_output_norm", w.mlp_output_norm);
    f("query_norm", w.query_norm)("key_norm", w.key_norm)("head_norm_eps", w.head_norm_eps);
    f("qkv", w.qkv)("attention_output", w.attention_output);
    f("mlp_up", w.mlp_up)("mlp_down", w.mlp_down)("window", w.window);
  });
  structure<DecoderWeights>(m, "DecoderWeights", [](Fields& f, DecoderWeights& w) {
    f("dtype", w.dtype)("hidden", w.hidden)("vocab", w.vocab)("num_heads", w.num_heads);
    f("num_kv_heads", w.num_kv_heads)("head_dim", w.head_dim)("rotary_dim", w.rotary_dim);
    f("rms", w.rms)("parallel_residual", w.parallel_residual)("gated", w.gated);
    f("activation", w.activation)("norm_weight_offset", w.norm_weight_offset);
    f("attention_scale", w.attention_scale)("attention_softcap", w.attention_softcap);
    f("final_softcap", w.final_softcap)("embedding_scale", w.embedding_scale);
    f("embedding", w.embedding)("position_embedding", w.position_embedding);
    f("position_offset", w.position_offset)("embedding_norm", w.embedding_norm);
    f("final_norm", w.final_norm)("head", w.head)("cos_sin", w.cos_sin);
    f("alibi_slopes", w.alibi_slopes)("layers", w.layers);
  });
}

void define_rows(py::module_& m) {
  structure<LayerCache>(m, "LayerCache",
                        [](Fields& f, LayerCache& c) { f("keys", c.keys)("values", c.values); });
  structure<DecodeRows>(m, "DecodeRows", [](Fields& f, DecodeRows& r) {
    f("tokens", r.tokens)("lengths", r.lengths)("steps", r.steps);
    f("room", r.room)("indices", r.indices)("seeds", r.seeds);
    f("block_tables", r.block_tables)("seen", r.seen);
    f("max_blocks", r.max_blocks)("block_size", r.block_size);
    f("temperature", r.temperature)("top_k", r.top_k)("top_p", r.top_p)("min_p", r.min_p);
    f("repetition_penalty", r.repetition_penalty)("stop_tokens", r.stop_tokens);
    f("min_new_tokens", r.min_new_tokens)("max_new_tokens", r.max_new_tokens);
    f("out_tokens", r.out_tokens)("out_logprobs", r.out_logprobs);
    f("out_truncated", r.out_truncated)("out_lengths", r.out_lengths);
  });
}

}  // namespace

PYBIND11_MODULE(hybrid_engine_runtime, m) {
  define_weights(m);
  define_rows(m);
  py::class_<DecodeProgram>(m, "DecodeProgram")
      .def(py::init<DecoderWeights>(), py::arg("weights"))
      .def("run", &DecodeProgram::run, py::arg("rows"), py::arg("cache"), py::arg("count"),
           py::arg("most"), py::call_guard<py::gil_scoped_release>(),
           "Advance the first `count` rows by 1 to `most` tokens; returns how many.")
      .def_property_readonly(
          "seconds",
          [](const DecodeProgram& program) {
            const auto& s = program.seconds();
            return py::dict(py::arg("matrices") = s[kMatrices],
                            py::arg("attention") = s[kAttention],
                            py::arg("sampling") = s[kSampling], py::arg("rest") = s[kRest]);
          },
          "Seconds spent so far, by part of a step.");
}

}  // namespace he::runtime
