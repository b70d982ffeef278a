// A CUDA device over host memory: every operator runs through PyTorch's fallback to the CPU.
//
// What a GPU refuses is refused: operands on two devices are an error (check_devices). What is uninitialised on a GPU
// is so here, and NaN where torch.utils.deterministic.fill_uninitialized_memory asks for it (poisoned). Backward runs
// on a thread of the autograd engine, as for every device but the CPU.
//
// Idle (pretended_idle), it computes nothing: an operator's results have the right shapes and strides, asked of the meta
// device, and memory is zero until the host copies something there. So programs run at sizes that no host computes.
//
// In a build of PyTorch without CUDA the key is free. In a build with CUDA the kernels that are registered there are
// replaced, one by one (replace_kernels), and so are allocator, guard and hooks; nothing asks for a driver then.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <atomic>
#include <mutex>
#include <unordered_map>
#include <unordered_set>

namespace {

constexpr auto CUDA = c10::DeviceType::CUDA;
const c10::Device DEVICE(CUDA, 0);
const c10::Stream STREAM(c10::Stream::DEFAULT, DEVICE);

// ---- one device, one stream, on which everything is done as soon as it is asked for

struct Guard final : c10::impl::NoOpDeviceGuardImpl<CUDA> {
  c10::Device exchangeDevice(c10::Device) const override { return DEVICE; }
  c10::Device getDevice() const override { return DEVICE; }
  c10::Stream getStream(c10::Device) const noexcept override { return STREAM; }
  c10::Stream getDefaultStream(c10::Device) const override { return STREAM; }
  c10::Stream getNewStream(c10::Device, int) const override { return STREAM; }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return STREAM; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// ---- memory: counted, with the 80 GB of the card as its end

std::mutex memory_lock;
std::unordered_map<void*, size_t> device_memory;
std::unordered_set<const void*> pinned_memory;
bool idle = false;
constexpr size_t IDLE_COPY = size_t{1} << 20;
size_t allocated = 0;
size_t peak = 0;
constexpr size_t TOTAL = size_t{80} << 30;
constexpr size_t ALIGNMENT = 512;  // the caching allocator's

void* aligned(size_t bytes) {
  void* pointer = nullptr;
  if (posix_memalign(&pointer, ALIGNMENT, bytes)) throw std::bad_alloc();
  return pointer;
}

// zero, and without a page of the host's until it is written
void* untouched(size_t bytes) {
  void* pointer = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pointer == MAP_FAILED) throw std::bad_alloc();
  return pointer;
}

struct DeviceAllocator final : c10::Allocator {
  static void release(void* pointer) {
    std::lock_guard<std::mutex> guard(memory_lock);
    const auto found = device_memory.find(pointer);
    allocated -= found->second;
    if (idle) munmap(pointer, found->second);
    else std::free(pointer);
    device_memory.erase(found);
  }
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &c10::detail::deleteNothing, DEVICE};
    const size_t rounded = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    std::lock_guard<std::mutex> guard(memory_lock);
    TORCH_CHECK_WITH(
        OutOfMemoryError, allocated + rounded <= TOTAL, "CUDA out of memory. Tried to allocate ", bytes, " bytes.");
    void* pointer = idle ? untouched(rounded) : aligned(rounded);
    device_memory[pointer] = rounded;
    allocated += rounded;
    peak = std::max(peak, allocated);
    return {pointer, pointer, &release, DEVICE};
  }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};
DeviceAllocator device_allocator;

struct PinnedAllocator final : c10::Allocator {
  static void release(void* pointer) {
    std::lock_guard<std::mutex> guard(memory_lock);
    pinned_memory.erase(pointer);
    std::free(pointer);
  }
  c10::DataPtr allocate(size_t bytes) override {
    void* pointer = aligned(std::max<size_t>(bytes, 1));
    std::lock_guard<std::mutex> guard(memory_lock);
    pinned_memory.insert(pointer);
    return {pointer, pointer, &release, c10::Device(c10::kCPU)};
  }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};
PinnedAllocator pinned_allocator;

// ---- capture: a graph records nothing, but what waits for the device is an error meanwhile

std::atomic<bool> capturing{false};
thread_local int inside = 0;  // of an operator or a kernel, whose own copies are of the pretence

void check_not_capturing(const char* what) {
  TORCH_CHECK(!capturing || inside, "CUDA error: operation not permitted when stream is capturing (", what, ")");
}

// ---- what ATen asks of the CUDA library

struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  void deviceSynchronize(c10::DeviceIndex) const override {}
  at::Device getDeviceFromPtr(void*) const override { return DEVICE; }
  at::Allocator* getCUDADeviceAllocator() const override { return &device_allocator; }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  bool isPinnedPtr(const void* pointer) const override {
    std::lock_guard<std::mutex> guard(memory_lock);
    return pinned_memory.count(pointer) > 0;
  }
  // operators run on the CPU, with its generators
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
};

const auto hooks_registered = [] {
  const auto make = [](at::CUDAHooksArgs arguments) -> std::unique_ptr<at::CUDAHooksInterface> {
    return std::make_unique<CUDAHooks>(arguments);
  };
  at::CUDAHooksRegistry()->Register("CUDAHooks", make, c10::REGISTRY_PREFERRED);
  return true;
}();

// ---- the operators that every backend has to have

at::Tensor on_host(const at::Tensor& tensor) {
  if (tensor.device().type() != CUDA) return tensor.detach();
  auto storage = tensor.storage();
  return at::from_blob(
      tensor.numel() ? tensor.data_ptr() : nullptr, tensor.sizes(), tensor.strides(), [storage](void*) {},
      tensor.options().device(at::kCPU).requires_grad(false));
}

at::Tensor poisoned(at::Tensor tensor) {
  const auto& context = at::globalContext();
  if (!idle && tensor.numel() && context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory()) {
    auto host = on_host(tensor);
    at::native::fill_empty_deterministic_(host);
  }
  return tensor;
}

constexpr c10::DispatchKeySet KEYS(c10::DispatchKey::CUDA);

at::Tensor empty(
    at::IntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>,
    std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return poisoned(at::detail::empty_generic(sizes, &device_allocator, KEYS, c10::dtype_or_default(dtype), format));
}

at::Tensor empty_strided(
    at::IntArrayRef sizes, at::IntArrayRef strides, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device>, std::optional<bool>) {
  return poisoned(
      at::detail::empty_strided_generic(sizes, strides, &device_allocator, KEYS, c10::dtype_or_default(dtype)));
}

at::Tensor& copy_(at::Tensor& to, const at::Tensor& from, bool non_blocking) {
  if (to.device() != from.device() && !non_blocking) check_not_capturing("a copy between devices");
  // a large tensor from the host would take the host's memory twice
  if (idle && (from.device().type() == CUDA || to.nbytes() > IDLE_COPY) && to.device().type() == CUDA) return to;
  auto host = on_host(to);
  auto source = on_host(from);
  if (from.is_neg()) source = source.neg();
  if (from.is_conj()) source = source.conj();
  if (to.numel()) host.copy_(source);
  return to;
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  auto target = to;
  return copy_(target, from, non_blocking);
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Tensor& fill_(at::Tensor& tensor, const at::Scalar& value) {
  if (!idle) on_host(tensor).fill_(value);
  return tensor;
}

at::Tensor& zero_(at::Tensor& tensor) {
  if (!idle) on_host(tensor).zero_();
  return tensor;
}

at::Scalar local_scalar_dense(const at::Tensor& tensor) {
  check_not_capturing("item()");
  return on_host(tensor).item();
}

at::Tensor as_strided(
    const at::Tensor& tensor, at::IntArrayRef sizes, at::IntArrayRef strides, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(tensor, sizes, strides, offset);
}

const at::Tensor& resize_(const at::Tensor& tensor, at::IntArrayRef sizes, std::optional<at::MemoryFormat>) {
  if (tensor.sizes() == sizes) return tensor;
  const auto elements = c10::multiply_integers(sizes) + tensor.storage_offset();
  const auto bytes = static_cast<size_t>(elements) * tensor.itemsize();
  auto* storage = tensor.storage().unsafeGetStorageImpl();
  if (storage->nbytes() < bytes) {
    auto grown = device_allocator.allocate(bytes);
    if (storage->data()) std::memcpy(grown.get(), storage->data(), storage->nbytes());
    storage->set_data_ptr_noswap(std::move(grown));
    storage->set_nbytes(bytes);
  }
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return tensor;
}

at::Tensor& set_view(
    at::Tensor& tensor, at::Storage storage, int64_t offset, at::IntArrayRef sizes, at::IntArrayRef strides) {
  const auto contiguous = c10::contiguous_strides(sizes);
  tensor.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  tensor.unsafeGetTensorImpl()->set_storage_offset(offset);
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides.empty() ? at::IntArrayRef(contiguous) : strides);
  return tensor;
}

at::Tensor& set_storage(at::Tensor& tensor, at::Storage storage) {
  const int64_t elements = storage.nbytes() / tensor.itemsize();
  return set_view(tensor, std::move(storage), 0, {elements}, {1});
}

at::Tensor& set_tensor(at::Tensor& tensor, const at::Tensor& other) {
  return set_view(tensor, other.storage(), other.storage_offset(), other.sizes(), other.strides());
}

// ---- every other operator

// index tensors on the CPU are taken, and copies are between devices
const std::unordered_set<std::string> TWO_DEVICES = {
    "aten::index.Tensor", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_foreach_copy_"};

void check_devices(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  const auto name = c10::toString(op.operator_name());
  if (TWO_DEVICES.count(name)) return;
  bool device = false;
  bool host = false;
  const auto see = [&](const at::Tensor& tensor) {
    if (!tensor.defined()) return;
    device |= tensor.device().type() == CUDA;
    host |= tensor.device().is_cpu() && tensor.dim() > 0;  // a number goes with elementwise operators
  };
  for (const auto& value : torch::jit::last(stack, op.schema().arguments().size())) {
    if (value.isTensor()) see(value.toTensor());
    if (value.isTensorList()) {
      for (const auto& tensor : value.toTensorVector()) see(tensor);
    }
    if (value.isOptionalTensorList()) {
      for (const auto& tensor : value.toOptionalTensorVector()) {
        if (tensor) see(*tensor);
      }
    }
  }
  TORCH_CHECK(
      !(device && host), "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and "
      "cpu! (when checking arguments of ", name, ")");
}

c10::IValue shape_of(const c10::IValue& value) {
  const auto shape = [](const at::Tensor& tensor) {
    if (!tensor.defined() || tensor.device().type() != CUDA) return tensor;
    return at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(at::kMeta));
  };
  if (value.isTensor()) return shape(value.toTensor());
  if (value.isDevice() && value.toDevice().type() == CUDA) return c10::Device(at::kMeta);
  if (value.isTensorList()) {
    c10::List<at::Tensor> shapes;
    for (const auto& tensor : value.toTensorVector()) shapes.push_back(shape(tensor));
    return shapes;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> shapes;
    for (const auto& tensor : value.toOptionalTensorVector()) {
      shapes.push_back(tensor ? std::optional<at::Tensor>(shape(*tensor)) : std::nullopt);
    }
    return shapes;
  }
  return value;
}

c10::IValue of_shape(const c10::IValue& value) {
  const auto made = [](const at::Tensor& shape) {
    if (!shape.defined() || !shape.is_meta()) return shape;
    return at::empty_strided(shape.sizes(), shape.strides(), shape.options().device(DEVICE));
  };
  if (value.isTensor()) return made(value.toTensor());
  if (!value.isTensorList()) return value;
  c10::List<at::Tensor> tensors;
  for (const auto& shape : value.toTensorVector()) tensors.push_back(made(shape));
  return tensors;
}

// The operator's results without its work; false where their shapes depend on values.
bool without_work(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const auto& returns = op.schema().returns();
  const auto given = torch::jit::last(*stack, arguments.size()).vec();
  torch::jit::Stack shapes;
  for (const auto& value : given) shapes.push_back(shape_of(value));
  const torch::jit::Stack before = shapes;
  try {
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::Meta), &shapes);
  } catch (const std::exception&) {
    return false;
  }
  torch::jit::drop(*stack, arguments.size());
  for (size_t place = 0; place < returns.size(); ++place) {
    c10::IValue result;
    const auto* written = returns[place].alias_info();
    for (size_t index = 0; written && index < arguments.size(); ++index) {
      const auto* alias = arguments[index].alias_info();
      if (!alias || alias->beforeSets() != written->beforeSets()) continue;
      result = given[index];  // in place, or out=
      if (result.isTensor() && before[index].isTensor()) result.toTensor().resize_(before[index].toTensor().sizes());
    }
    torch::jit::push(*stack, result.isNone() ? of_shape(shapes[place]) : result);
  }
  return true;
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  check_devices(op, *stack);
  struct Inside {
    Inside() { ++inside; }
    ~Inside() { --inside; }
  } now;
  if (idle && without_work(op, stack)) return;
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

// In this order the last registration of an operator wins: first the fallback over what a CUDA build brings.
const auto replace_kernels = [] {
  struct : c10::WarningHandler {
    void process(const c10::Warning&) override {}
  } silent;  // it says that a kernel is replaced
  c10::WarningUtils::WarningHandlerGuard guard(&silent);
  static torch::Library library(torch::Library::IMPL, "aten", c10::DispatchKey::CUDA, __FILE__, __LINE__);
  for (const auto& name : c10::Dispatcher::singleton().getAllOpNames()) {
    const auto op = c10::Dispatcher::singleton().findSchema(name);
    if (name.name.rfind("aten::", 0) || !op || !op->hasKernelForDispatchKey(c10::DispatchKey::CUDA)) continue;
    library.impl(c10::toString(name).c_str(), torch::CppFunction::makeFromBoxedFunction<&fallback>());
  }
  return true;
}();

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("copy_", &copy_);
  library.impl("fill_.Scalar", &fill_);
  library.impl("zero_", &zero_);
  library.impl("_copy_from", &copy_from);
  library.impl("_copy_from_and_resize", &copy_from_and_resize);
  library.impl("_local_scalar_dense", &local_scalar_dense);
  library.impl("as_strided", &as_strided);
  library.impl("_reshape_alias", &at::native::_reshape_alias);
  library.impl("view", &at::native::view);
  library.impl("unfold", &at::native::unfold);
  library.impl("resize_", &resize_);
  library.impl("set_.source_Storage", &set_storage);
  library.impl("set_.source_Storage_storage_offset", &set_view);
  library.impl("set_.source_Tensor", &set_tensor);
}

const bool allocator_set = [] {
  c10::SetAllocator(CUDA, &device_allocator, /*priority=*/255);
  return true;
}();

}  // namespace

// ---- what torch.cuda answers with (cuda.py)

extern "C" {
uint64_t pretended_allocated() { return allocated; }
uint64_t pretended_peak() { return peak; }
void pretended_reset_peak() {
  std::lock_guard<std::mutex> guard(memory_lock);
  peak = allocated;
}
void pretended_capture(bool begins) { capturing = begins; }
void pretended_idle(bool chosen) { idle = chosen; }
void pretended_inside(int more) { inside += more; }
}
