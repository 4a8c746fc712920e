// What a serving engine does with the core and with artifacts of the library: it loads a memory and edits from their
// safetensors files, and runs one layer's shift and neurons on a batch whose rows have edits of their own.
//
//   python3 setup.py build_core --output core
//   c++ -std=c++20 csrc/examples/engine.cpp -Icore/include -Lcore/lib -lunike -Wl,-rpath,core/lib -o engine
//   ./engine LAYER K memory.safetensors batch.safetensors out.bin edit.safetensors...
//
// The batch holds float32 hidden, attention, ffn_in and ffn_out, each [rows, d]; row i uses the first i edits. The output
// is the shifted attention and then the edited FFN output, float32 [rows, d] each.
#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "unike/cosine_topk.h"
#include "unike/latent_attention.h"
#include "unike/patched_ffn.h"

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
      size_t used = 0;
      found.push_back(std::stoll(text_.substr(at_), &used));
      at_ += used;
    }
    expect(']');
    return found;
  }

  std::string string() {
    expect('"');
    std::string found;
    while (at_ < text_.size() && text_[at_] != '"') {
      if (text_[at_] == '\\') ++at_;  // what is escaped is in no name or dtype
      found += text_[at_++];
    }
    expect('"');
    return found;
  }

 private:
  bool next_is(char c) {
    while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_]))) ++at_;
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

std::map<std::string, Tensor> load(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + ": cannot be read");
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  uint64_t length = 0;
  if (bytes.size() < sizeof length) throw std::runtime_error(path + ": not a safetensors file");
  std::memcpy(&length, bytes.data(), sizeof length);
  if (length > bytes.size() - sizeof length) throw std::runtime_error(path + ": truncated");
  const size_t start = sizeof length + length;
  Header header(std::string(bytes.data() + sizeof length, length));
  std::map<std::string, Tensor> found;
  header.object([&](const std::string& name) {
    if (name == "__metadata__") {
      header.object([&](const std::string&) { header.string(); });
      return;
    }
    Tensor tensor;
    std::string dtype;
    std::vector<int64_t> offsets;
    header.object([&](const std::string& field) {
      if (field == "dtype") dtype = header.string();
      if (field == "shape") tensor.shape = header.integers();
      if (field == "data_offsets") offsets = header.integers();
    });
    if (dtype != "F32") throw std::runtime_error(path + ": " + name + " is " + dtype + ", this program reads F32");
    if (offsets.size() != 2 || offsets[0] < 0 || offsets[1] < offsets[0] ||
        static_cast<uint64_t>(offsets[1]) > bytes.size() - start) {
      throw std::runtime_error(path + ": " + name + " lies outside of the file");
    }
    tensor.data.resize((offsets[1] - offsets[0]) / sizeof(float));
    std::memcpy(tensor.data.data(), bytes.data() + start + offsets[0], offsets[1] - offsets[0]);
    found.emplace(name, std::move(tensor));
  });
  return found;
}

const Tensor& at(const std::map<std::string, Tensor>& tensors, const std::string& name) {
  const auto found = tensors.find(name);
  if (found == tensors.end()) throw std::runtime_error("there is no tensor " + name);
  return found->second;
}

void check(unike_status status) {
  if (status != UNIKE_OK) throw std::runtime_error(unike_last_error());
}

// An engine keeps one workspace that is large enough for all its calls.
void* workspace(std::vector<char>& room, int64_t bytes) {
  if (bytes < 0) throw std::runtime_error(unike_last_error());
  room.resize(std::max<size_t>(room.size(), bytes));
  return room.data();
}

unike_rows rows_of(const Tensor& t) { return {t.data.data(), UNIKE_F32, t.shape.at(1)}; }

// The memory's shift of the attention output (Eq. 2, 7 and 8), with the defaults of Config.
std::vector<float> shifted(const std::map<std::string, Tensor>& memory, const std::string& layer, int64_t k,
                           const Tensor& hidden, const Tensor& attention, std::vector<char>& room) {
  const Tensor &index = at(memory, layer + "index"), &keys = at(memory, layer + "keys");
  const int64_t n = index.shape.at(0), d = index.shape.at(1), m = hidden.shape.at(0);
  std::vector<float> unit(n * d), out(m * d), alpha(m);
  check(unike_normalize_rows({index.data.data(), UNIKE_F32, d}, n, d, unit.data(), kThreads));
  const unike_keys searched{n, d, unit.data(), d, UNIKE_SCAN_F32, nullptr, nullptr, nullptr};

  const auto values = memory.find(layer + "values");
  const int64_t heads = keys.shape.at(1), width = keys.shape.at(2);
  const float* value_data = values == memory.end() ? keys.data.data() : values->second.data.data();
  const unike_memory tables{n, heads, width, UNIKE_F32, keys.data.data(), value_data, nullptr};
  const Tensor &w1 = at(memory, layer + "encoder.w1"), &w2 = at(memory, layer + "encoder.w2");
  const unike_semantic_encoder encoder{w1.shape.at(0), UNIKE_F32,
                                       w1.data.data(), at(memory, layer + "encoder.b1").data.data(),
                                       w2.data.data(), at(memory, layer + "encoder.b2").data.data()};
  const unike_blend blend{1.0f / std::sqrt(static_cast<float>(width)), 0, 1, nullptr, 0, nullptr, 0};
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
    append(keys, at(edit, layer + "keys"));
    append(bias, at(edit, layer + "key_bias"));
    append(values, at(edit, layer + "values"));
    append(zeta, at(edit, layer + "zeta"));
    append(beta, at(edit, layer + "beta"));
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
  const auto attention = shifted(memory, layer, std::stoll(argv[2]), at(batch, "hidden"), at(batch, "attention"), room);
  const auto ffn = edited(edits, layer, at(batch, "ffn_in"), at(batch, "ffn_out"), room);
  std::ofstream out(argv[5], std::ios::binary);
  for (const auto& part : {attention, ffn}) {
    out.write(reinterpret_cast<const char*>(part.data()), static_cast<std::streamsize>(part.size() * sizeof(float)));
  }
  return out ? 0 : 1;
} catch (const std::exception& error) {
  std::cerr << "engine: " << error.what() << "\n";
  return 1;
}
