#include <vector>

#include "bindings/binding.h"

namespace he::binding {
namespace {

// Columns of the plan; `UnpackEntry` in hybrid_engine/ops/gather.py writes them.
enum Column {
  kSource,
  kPartition,
  kRows,
  kColumns,
  kDestination,
  kDestinationRow,
  kRowBegin,
  kRowEnd,
  kColumnBegin,
  kColumnEnd,
  kLora,
  kPlanWidth,
};

struct Operands {
  const Tensor& bucket;
  const std::vector<Tensor>& destinations;
  const std::vector<Tensor>& lora_a;
  const std::vector<Tensor>& lora_b;
  const std::vector<double>& lora_scales;
};

// Fails with the plan's row and column unless low <= value <= high.
void check_plan(int64_t row, const char* column, int64_t value, int64_t low, int64_t high) {
  STD_TORCH_CHECK(low <= value && value <= high, "plan: entry ", row, ": ", column,
                  ": expected a value in [", low, ", ", high, "], got ", value);
}

void check_source(const int64_t* plan, int64_t row, const Tensor& bucket) {
  check_plan(row, "rows", plan[kRows], 0, INT32_MAX);
  check_plan(row, "columns", plan[kColumns], 0, INT32_MAX);
  check_plan(row, "partition", plan[kPartition], 1, bucket.size(1));
  check_plan(row, "source", plan[kSource], 0, bucket.size(1) - plan[kPartition]);
  const int64_t numel = plan[kRows] * plan[kColumns];
  STD_TORCH_CHECK(numel <= bucket.size(0) * plan[kPartition], "plan: entry ", row, ": ", numel,
                  " elements do not fit in ", bucket.size(0), " partitions of ", plan[kPartition]);
  check_plan(row, "row_end", plan[kRowEnd], 0, plan[kRows]);
  check_plan(row, "row_begin", plan[kRowBegin], 0, plan[kRowEnd]);
  check_plan(row, "column_end", plan[kColumnEnd], 0, plan[kColumns]);
  check_plan(row, "column_begin", plan[kColumnBegin], 0, plan[kColumnEnd]);
}

void fill_destination(UnpackEntry& entry, const int64_t* plan, int64_t row, const Operands& in) {
  check_plan(row, "destination", plan[kDestination], 0, in.destinations.size() - 1);
  const Tensor& to = in.destinations[plan[kDestination]];
  check_contiguous("destinations", to);
  check_same_device("destinations", to, in.bucket);
  STD_TORCH_CHECK(to.dim() == 1 || to.dim() == 2,
                  "destinations: expected vectors and matrices, got ",
                  join(to.sizes().data(), to.dim()));
  const int64_t width = to.dim() == 1 ? 1 : to.size(1), rows = plan[kRowEnd] - plan[kRowBegin];
  STD_TORCH_CHECK(width == plan[kColumnEnd] - plan[kColumnBegin], "destinations: entry ", row,
                  ": expected ", plan[kColumnEnd] - plan[kColumnBegin], " columns, got ", width);
  check_plan(row, "destination_row", plan[kDestinationRow], 0, to.size(0) - rows);
  entry.dtype = float_dtype("destinations", to);
  const int64_t size = entry.dtype == DType::kFloat32 ? 4 : 2;
  entry.destination = static_cast<char*>(const_cast<void*>(to.const_data_ptr())) +
                      plan[kDestinationRow] * width * size;
}

void fill_lora(UnpackEntry& entry, const int64_t* plan, int64_t row, const Operands& in) {
  check_plan(row, "lora", plan[kLora], -1, static_cast<int64_t>(in.lora_a.size()) - 1);
  if (plan[kLora] < 0) return;
  const Tensor &a = in.lora_a[plan[kLora]], &b = in.lora_b[plan[kLora]];
  check_operand("lora_a", a, {kAny, plan[kColumns]}, a.scalar_type(), in.bucket);
  check_operand("lora_b", b, {plan[kRows], a.size(0)}, a.scalar_type(), in.bucket);
  entry.lora_a = a.const_data_ptr();
  entry.lora_b = b.const_data_ptr();
  entry.lora_rank = a.size(0);
  entry.lora_dtype = float_dtype("lora_a", a);
  entry.lora_scale = static_cast<float>(in.lora_scales[plan[kLora]]);
}

UnpackEntry checked_entry(const int64_t* plan, int64_t row, const Operands& in) {
  check_source(plan, row, in.bucket);
  UnpackEntry entry{};
  entry.source = plan[kSource];
  entry.partition = plan[kPartition];
  entry.rows = plan[kRows];
  entry.columns = plan[kColumns];
  entry.row_begin = plan[kRowBegin];
  entry.row_end = plan[kRowEnd];
  entry.column_begin = plan[kColumnBegin];
  entry.column_end = plan[kColumnEnd];
  fill_destination(entry, plan, row, in);
  fill_lora(entry, plan, row, in);
  return entry;
}

void gather_unpack(const Tensor& bucket, const Tensor& plan, std::vector<Tensor> destinations,
                   std::vector<Tensor> lora_a, std::vector<Tensor> lora_b,
                   std::vector<double> lora_scales) {
  const DType dtype = float_dtype("bucket", bucket);
  check_operand("bucket", bucket, {kAny, kAny}, bucket.scalar_type(), bucket);
  check_shape("plan", plan, {kAny, kPlanWidth});
  check_dtype("plan", plan, ScalarType::Long);
  check_contiguous("plan", plan);
  STD_TORCH_CHECK(plan.device().is_cpu(), "plan: expected a tensor on the CPU");
  STD_TORCH_CHECK(lora_a.size() == lora_b.size() && lora_a.size() == lora_scales.size(),
                  "lora_b, lora_scales: expected ", lora_a.size(), " of each, as in lora_a, got ",
                  lora_b.size(), " and ", lora_scales.size());
  const Operands operands{bucket, destinations, lora_a, lora_b, lora_scales};
  std::vector<UnpackEntry> entries;
  for (int64_t row = 0; row < plan.size(0); ++row) {
    entries.push_back(checked_entry(data<int64_t>(plan) + row * kPlanWidth, row, operands));
  }
  if (entries.empty()) return;
  GatherUnpack args{};
  args.bucket = bucket.const_data_ptr();
  args.entries = entries.data();
  args.num_entries = entries.size();
  args.rank_length = bucket.size(1);
  args.dtype = dtype;
  Launch launch(bucket);
  HE_DEVICE::gather_unpack(args, launch.stream());
}

HE_REGISTER(m) { m.impl("gather_unpack", TORCH_BOX(&gather_unpack)); }

}  // namespace
}  // namespace he::binding
