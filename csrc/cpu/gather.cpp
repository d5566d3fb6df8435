// Unpacks an all-gathered bucket. An entry is cut into pieces of whole destination rows; each piece
// is copied, converted, or summed with its low-rank product, in runs that end where a row or a
// rank's part does. Every element is read once and written once.
#include <algorithm>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/tile.h"
#include "cpu/vec.h"

namespace he::cpu {
namespace {

constexpr int64_t kElementsOfPiece = 32768;

struct Piece {
  const UnpackEntry* entry;
  int64_t begin, end;  // source rows
};

// Calls body(source, place, count) for the stretches of the flat parameter [begin, end) that lie
// together in the bucket; `place` counts from `begin`.
template <typename Source, typename Body>
void for_each_stretch(const GatherUnpack& a, const UnpackEntry& entry, int64_t begin, int64_t end,
                      const Body& body) {
  for (int64_t i = begin; i < end;) {
    const int64_t rank = i / entry.partition, offset = i % entry.partition;
    const int64_t count = std::min(entry.partition - offset, end - i);
    const int64_t start = rank * a.rank_length + entry.source + offset;
    body(static_cast<const Source*>(a.bucket) + start, i - begin, count);
    i += count;
  }
}

// out += scale * b[row, :] a[:, columns]
template <typename Factor>
void add_low_rank(float* out, const UnpackEntry& entry, int64_t row) {
  const int64_t width = entry.column_end - entry.column_begin;
  const Factor* b = static_cast<const Factor*>(entry.lora_b) + row * entry.lora_rank;
  for (int64_t r = 0; r < entry.lora_rank; ++r) {
    const Factor* a =
        static_cast<const Factor*>(entry.lora_a) + r * entry.columns + entry.column_begin;
    const float weight = entry.lora_scale * to_float(b[r]);
    map_vecs(out, width, [&](Vec sum, Vec v) { return sum + weight * v; }, out, a);
  }
}

template <typename Source, typename To>
void unpack(const GatherUnpack& a, const Piece& piece, std::vector<float>& wide) {
  const UnpackEntry& entry = *piece.entry;
  const int64_t width = entry.column_end - entry.column_begin;
  To* to = static_cast<To*>(entry.destination) + (piece.begin - entry.row_begin) * width;
  const auto plain = [&](int64_t begin, int64_t end, To* out) {
    for_each_stretch<Source>(a, entry, begin, end,
                             [&](const Source* from, int64_t place, int64_t count) {
                               convert(out + place, from, count);
                             });
  };
  if (entry.lora_a == nullptr && width == entry.columns) {
    return plain(piece.begin * width, piece.end * width, to);
  }
  for (int64_t row = piece.begin; row < piece.end; ++row, to += width) {
    const int64_t begin = row * entry.columns + entry.column_begin;
    if (entry.lora_a == nullptr) {
      plain(begin, begin + width, to);
      continue;
    }
    wide.resize(width);
    for_each_stretch<Source>(a, entry, begin, begin + width,
                             [&](const Source* from, int64_t place, int64_t count) {
                               convert(wide.data() + place, from, count);
                             });
    dispatch(entry.lora_dtype,
             [&](auto factor) { add_low_rank<decltype(factor)>(wide.data(), entry, row); });
    convert(to, wide.data(), width);
  }
}

}  // namespace

void gather_unpack(const GatherUnpack& args, Stream) {
  std::vector<Piece> pieces;
  int64_t elements = 0;
  for (int64_t i = 0; i < args.num_entries; ++i) {
    const UnpackEntry& entry = args.entries[i];
    const int64_t width = entry.column_end - entry.column_begin;
    const int64_t step = std::max<int64_t>(1, kElementsOfPiece / std::max<int64_t>(1, width));
    for (int64_t row = entry.row_begin; row < entry.row_end; row += step) {
      pieces.push_back({&entry, row, std::min(row + step, entry.row_end)});
    }
    elements += width * (entry.row_end - entry.row_begin);
  }
  parallel_tasks(pieces.size(), 1 + elements / kElementsOfPiece, [&](const auto& next) {
    std::vector<float> wide;
    for (int64_t i = next(); i >= 0; i = next()) {
      dispatch(args.dtype, [&](auto source) {
        dispatch(pieces[i].entry->dtype,
                 [&](auto to) { unpack<decltype(source), decltype(to)>(args, pieces[i], wide); });
      });
    }
  });
}

}  // namespace he::cpu
