// What a serving engine does with the core and with artifacts of the library: it loads a memory and edits from their
// safetensors files, and runs one layer's shift and neurons on a batch whose rows have edits of their own.
//
//   python3 setup.py build_core --output core
//   c++ -std=c++20 examples/engine.cpp -Icore/include -Lcore/lib -lunike -Wl,-rpath,core/lib -o engine
//   ./engine LAYER K memory.safetensors batch.safetensors out.bin edit.safetensors...
//
// The batch holds float32 hidden, attention, ffn_in and ffn_out, each [rows, d]; row i uses the first i edits. The output
// is the shifted attention and then the edited FFN output, float32 [rows, d] each.
//
// Files may come from anybody. What a header says is compared with the bytes that are there before any is used, and each
// tensor's shape with what the call that reads it expects; the core trusts shapes, as it sees pointers alone.
#include <algorithm>
#include <cctype>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <initializer_list>
#include <iostream>
#include <iterator>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "unike/cosine_topk.h"
#include "unike/extra_neurons.h"
#include "unike/latent_attention.h"
#include "unike/memory_attention.h"

namespace {

constexpr int kThreads = 2;

struct Tensor {
  std::vector<int64_t> shape;
  std::vector<float> data;
};

// As much of JSON as the header of a safetensors file is made of: objects, arrays, strings and integers.
class Header {
 public:
  explicit Header(std::string text) : text_(std::move(text)) {}

  // Calls visit(key) for each member of an object; visit has to read the value.
  template <typename Visit>
  void object(Visit visit) {
    expect('{');
    for (bool first = true; !next_is('}'); first = false) {
      if (!first) expect(',');
      const std::string key = string();
      expect(':');
      visit(key);
    }
    expect('}');
  }

  std::vector<int64_t> integers() {
    std::vector<int64_t> found;
    expect('[');
    while (!next_is(']')) {
      if (!found.empty()) expect(',');
      skip_space();
      int64_t value = 0;
      const char* end = text_.data() + text_.size();
      const auto [stop, error] = std::from_chars(text_.data() + at_, end, value);
      if (error != std::errc()) throw std::runtime_error("the header holds a wrong or too large number");
      found.push_back(value);
      at_ = stop - text_.data();
    }
    expect(']');
    return found;
  }

  std::string string() {
    expect('"');
    std::string found;
    while (at_ < text_.size() && text_[at_] != '"') {
      if (text_[at_] == '\\') ++at_;  // what is escaped is in no name or dtype
      if (at_ < text_.size()) found += text_[at_++];
    }
    expect('"');
    return found;
  }

  void end() {
    skip_space();
    if (at_ < text_.size()) throw std::runtime_error("something follows the header's object");
  }

 private:
  void skip_space() {
    while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_]))) ++at_;
  }

  bool next_is(char c) {
    skip_space();
    if (at_ == text_.size()) throw std::runtime_error("the header ends early");
    return text_[at_] == c;
  }

  void expect(char c) {
    if (!next_is(c)) throw std::runtime_error(std::string("the header lacks ") + c);
    ++at_;
  }

  std::string text_;
  size_t at_ = 0;
};

std::string text_of(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (const int64_t size : shape) text += (text.size() > 1 ? ", " : "") + (size < 0 ? "*" : std::to_string(size));
  return text + "]";
}

// How many elements a tensor of `most` at most has; refuses a shape that says otherwise.
int64_t elements(const std::vector<int64_t>& shape, int64_t most, const std::string& name) {
  int64_t count = 1;
  for (const int64_t size : shape) {
    if (size < 0 || __builtin_mul_overflow(count, size, &count)) {
      throw std::runtime_error(name + ": the shape " + text_of(shape) + " is none");
    }
  }
  if (count != most) {
    throw std::runtime_error(name + ": the shape " + text_of(shape) + " has " + std::to_string(count) +
                             " elements, the data " + std::to_string(most));
  }
  return count;
}

// The tensors must follow one another without a gap, as safetensors demands: then none overlaps another.
void check_layout(std::vector<std::pair<int64_t, int64_t>> spans, int64_t bytes) {
  std::sort(spans.begin(), spans.end());
  int64_t end = 0;
  for (const auto& [first, last] : spans) {
    if (first != end) throw std::runtime_error("tensors overlap, or bytes between them are of none");
    end = last;
  }
  if (end != bytes) throw std::runtime_error("the file has bytes that are of no tensor, or is truncated");
}

std::map<std::string, Tensor> read(const std::vector<char>& bytes) {
  uint64_t length = 0;
  if (bytes.size() < sizeof length) throw std::runtime_error("not a safetensors file");
  std::memcpy(&length, bytes.data(), sizeof length);
  if (length > bytes.size() - sizeof length) throw std::runtime_error("truncated");
  const char* data = bytes.data() + sizeof length + length;
  const auto size = static_cast<int64_t>(bytes.size() - sizeof length - length);
  Header header(std::string(bytes.data() + sizeof length, length));
  std::map<std::string, Tensor> found;
  std::vector<std::pair<int64_t, int64_t>> spans;
  header.object([&](const std::string& name) {
    if (name == "__metadata__") {
      header.object([&](const std::string&) { header.string(); });
      return;
    }
    Tensor tensor;
    std::string dtype;
    std::vector<int64_t> offsets;
    std::vector<std::string> fields;
    header.object([&](const std::string& field) {
      if (field == "dtype") {
        dtype = header.string();
      } else if (field == "shape") {
        tensor.shape = header.integers();
      } else if (field == "data_offsets") {
        offsets = header.integers();
      } else {
        throw std::runtime_error(name + ": unknown field " + field);
      }
      fields.push_back(field);
    });
    std::sort(fields.begin(), fields.end());
    if (fields != std::vector<std::string>{"data_offsets", "dtype", "shape"}) {
      throw std::runtime_error(name + ": expected dtype, shape and data_offsets, once each");
    }
    if (dtype != "F32") throw std::runtime_error(name + " is " + dtype + ", this program reads F32");
    if (offsets.size() != 2 || offsets[0] < 0 || offsets[1] < offsets[0] || offsets[1] > size) {
      throw std::runtime_error(name + " lies outside of the file");
    }
    const int64_t span = offsets[1] - offsets[0];
    if (span % sizeof(float) != 0) throw std::runtime_error(name + ": its data are no whole number of floats");
    tensor.data.resize(elements(tensor.shape, span / static_cast<int64_t>(sizeof(float)), name));
    if (span > 0) std::memcpy(tensor.data.data(), data + offsets[0], span);
    for (const float value : tensor.data) {
      if (!std::isfinite(value)) throw std::runtime_error(name + " holds NaN or infinity");
    }
    spans.emplace_back(offsets[0], offsets[1]);
    if (!found.emplace(name, std::move(tensor)).second) throw std::runtime_error(name + " is there twice");
  });
  header.end();
  check_layout(std::move(spans), size);
  return found;
}

std::map<std::string, Tensor> load(const std::string& path) try {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot be read");
  return read({std::istreambuf_iterator<char>(file), {}});
} catch (const std::runtime_error& error) {
  throw std::runtime_error(path + ": " + error.what());
}

constexpr int64_t kAny = -1;

// The tensor of this name, which must have this shape.
const Tensor& at(const std::map<std::string, Tensor>& tensors, const std::string& name,
                 const std::vector<int64_t>& shape) {
  const auto found = tensors.find(name);
  if (found == tensors.end()) throw std::runtime_error("there is no tensor " + name);
  const std::vector<int64_t>& has = found->second.shape;
  bool fits = has.size() == shape.size();
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = shape[i] == kAny || shape[i] == has[i];
  if (!fits) throw std::runtime_error(name + ": expected the shape " + text_of(shape) + ", got " + text_of(has));
  return found->second;
}

void check(unike_status status) {
  if (status != UNIKE_OK) throw std::runtime_error(unike_last_error());
}

// An engine keeps one workspace that is large enough for all its calls.
void* workspace(std::vector<char>& room, int64_t bytes) {
  if (bytes <= 0) throw std::runtime_error(unike_last_error());
  room.resize(std::max<size_t>(room.size(), bytes));
  return room.data();
}

unike_rows rows_of(const Tensor& t) { return {t.data.data(), UNIKE_F32, t.shape.at(1)}; }

// The memory's shift of the attention output (Eq. 2, 7 and 8), with the defaults of Config.
std::vector<float> shifted(const std::map<std::string, Tensor>& memory, const std::string& layer, int64_t k,
                           const Tensor& hidden, const Tensor& attention, std::vector<char>& room) {
  const int64_t m = hidden.shape.at(0), d = hidden.shape.at(1);
  const Tensor& index = at(memory, layer + "index", {kAny, d});
  const int64_t n = index.shape.at(0);
  // One head as wide as the state: memories of values="projected" need queries that this program does not make.
  const Tensor& keys = at(memory, layer + "keys", {n, 1, d});
  std::vector<float> unit(n * d), out(m * d), alpha(m);
  check(unike_normalize_rows({index.data.data(), UNIKE_F32, d}, n, d, unit.data(), kThreads));
  const unike_keys searched{n, d, unit.data(), d, UNIKE_SCAN_F32, nullptr, nullptr, nullptr, {}};

  const bool apart = memory.count(layer + "values") > 0;
  const Tensor& values = apart ? at(memory, layer + "values", {n, 1, d}) : keys;
  const unike_memory tables{n, 1, d, UNIKE_F32, keys.data.data(), values.data.data(), nullptr};
  const Tensor& w1 = at(memory, layer + "encoder.w1", {kAny, d});
  const int64_t r = w1.shape.at(0);
  const Tensor& w2 = at(memory, layer + "encoder.w2", {d, r});
  const unike_semantic_encoder encoder{r,
                                       UNIKE_F32,
                                       w1.data.data(),
                                       at(memory, layer + "encoder.b1", {r}).data.data(),
                                       w2.data.data(),
                                       at(memory, layer + "encoder.b2", {d}).data.data()};
  const unike_blend blend{1.0f / std::sqrt(static_cast<float>(d)), 0, 1, nullptr, 0, nullptr, 0};
  const unike_latent_inputs in{m, d, rows_of(hidden), rows_of(attention), nullptr, 0, k};
  const int64_t bytes = unike_memory_attention_workspace(&searched, &in, &tables, &encoder, kThreads);
  void* memory_room = workspace(room, bytes);
  check(unike_memory_attention(&searched, rows_of(hidden), nullptr, &in, &tables, &encoder, &blend,
                               {out.data(), UNIKE_F32, d}, alpha.data(), nullptr, memory_room, bytes, kThreads));
  return out;
}

// The FFN's output with the neurons of each row's edits (Eq. 3 and 6): row i uses the first i of them.
std::vector<float> edited(const std::vector<std::map<std::string, Tensor>>& edits, const std::string& layer,
                          const Tensor& x, const Tensor& base, std::vector<char>& room) {
  const int64_t m = x.shape.at(0), d = x.shape.at(1);
  std::vector<float> keys, bias, values, zeta, beta;
  std::vector<int64_t> indptr{0}, row_indptr{0}, row_edits;
  const auto append = [](std::vector<float>& to, const Tensor& t) {
    to.insert(to.end(), t.data.begin(), t.data.end());
  };
  for (const auto& edit : edits) {
    if (edit.count(layer + "up") > 0) throw std::runtime_error(layer + "up: this program adds plain neurons");
    const Tensor& own = at(edit, layer + "keys", {kAny, d});
    const int64_t n = own.shape.at(0);
    append(keys, own);
    append(bias, at(edit, layer + "key_bias", {n}));
    append(values, at(edit, layer + "values", {n, d}));
    append(zeta, at(edit, layer + "zeta", {d}));
    append(beta, at(edit, layer + "beta", {}));
    indptr.push_back(static_cast<int64_t>(bias.size()));
  }
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t edit = 0; edit < std::min<int64_t>(row, edits.size()); ++edit) row_edits.push_back(edit);
    row_indptr.push_back(static_cast<int64_t>(row_edits.size()));
  }
  const unike_edit_pool pool{indptr.back(),
                             static_cast<int64_t>(edits.size()),
                             m,
                             UNIKE_F32,
                             keys.data(),
                             bias.data(),
                             nullptr,
                             nullptr,
                             values.data(),
                             zeta.data(),
                             beta.data(),
                             indptr.data(),
                             row_indptr.data(),
                             row_edits.data(),
                             nullptr};
  std::vector<float> out(m * d);
  const int64_t bytes = unike_add_extra_neurons_workspace(m, d, &pool, kThreads);
  void* pool_room = workspace(room, bytes);
  check(unike_add_extra_neurons(rows_of(x), rows_of(base), m, d, &pool, UNIKE_SILU, {out.data(), UNIKE_F32, d},
                                pool_room, bytes, kThreads));
  return out;
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 6) throw std::runtime_error("usage: engine LAYER K memory batch out edit...");
  const std::string layer = std::string("layers.") + argv[1] + ".";
  const auto memory = load(argv[3]), batch = load(argv[4]);
  std::vector<std::map<std::string, Tensor>> edits;
  for (int i = 6; i < argc; ++i) edits.push_back(load(argv[i]));
  std::vector<char> room;
  const Tensor& hidden = at(batch, "hidden", {kAny, kAny});
  const std::vector<int64_t>& shape = hidden.shape;
  if (shape[1] < 1) throw std::runtime_error("hidden: expected at least one column, got " + text_of(shape));
  const int64_t k = std::stoll(argv[2]);
  const auto attention = shifted(memory, layer, k, hidden, at(batch, "attention", shape), room);
  const auto ffn = edited(edits, layer, at(batch, "ffn_in", shape), at(batch, "ffn_out", shape), room);
  std::ofstream out(argv[5], std::ios::binary);
  for (const auto& part : {attention, ffn}) {
    out.write(reinterpret_cast<const char*>(part.data()), static_cast<std::streamsize>(part.size() * sizeof(float)));
  }
  return out ? 0 : 1;
} catch (const std::exception& error) {
  std::cerr << "engine: " << error.what() << "\n";
  return 1;
}
