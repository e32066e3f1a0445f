// CUDA devices that compute nothing, for a build of torch without CUDA.
//
// Autograd and factory functions ask for a device guard and for "hooks" of the device. With these,
// fake tensors on "cuda" go through whole training steps. Streams and events only note in which
// order they are used. Page-locked memory is ordinary memory. Generators are missing.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <atomic>
#include <mutex>
#include <string>

namespace {

constexpr c10::DeviceIndex kDevices = 8;
thread_local c10::DeviceIndex current = 0;
thread_local c10::StreamId current_stream = 0;
std::atomic<c10::StreamId> num_streams{0};
std::atomic<intptr_t> num_events{0};

// What was done with streams and events, a line each.
std::mutex log_lock;
std::string stream_log;

void note(const std::string& line) {
  std::lock_guard<std::mutex> hold(log_lock);
  stream_log += line + "\n";
}

std::string number(void* event) { return std::to_string(reinterpret_cast<intptr_t>(event)); }

struct FakeGuard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const auto before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override { return {c10::DeviceType::CUDA, current}; }
  void setDevice(c10::Device device) const override { uncheckedSetDevice(device); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.has_index()) current = device.index();
  }
  c10::Stream getStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::UNSAFE, device, current_stream);
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    return c10::Stream(c10::Stream::UNSAFE, device, ++num_streams);
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const auto before = getStream(stream.device());
    current_stream = stream.id();
    return before;
  }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex,
              const c10::EventFlag) const override {
    *event = reinterpret_cast<void*>(++num_events);
    note("record " + number(*event) + " on " + std::to_string(stream.id()));
  }
  void block(void* event, const c10::Stream& stream) const override {
    note("stream " + std::to_string(stream.id()) + " waits for " + number(event));
  }
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void* event) const override { note("host waits for " + number(event)); }
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};

C10_REGISTER_GUARD_IMPL(CUDA, FakeGuard)

} // namespace

// Returns the lines since the last call, until the next call.
extern "C" const char* take_stream_log() {
  static std::string taken;
  std::lock_guard<std::mutex> hold(log_lock);
  taken.swap(stream_log);
  stream_log.clear();
  return taken.c_str();
}

namespace at {

// torch looks up a class of this name.
struct CUDAHooks final : CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  bool isPinnedPtr(const void*) const override { return false; }
  bool hasCUDART() const override { return true; }
  bool hasCuDNN() const override { return true; }
  bool compiledWithCuDNN() const override { return true; }
  bool supportsDilatedConvolutionWithCuDNN() const override { return true; }
  bool supportsDepthwiseConvolutionWithCuDNN() const override { return true; }
  bool supportsBFloat16ConvolutionWithCuDNNv8() const override { return true; }
  long versionCuDNN() const override { return 90100; }
  long versionRuntimeCuDNN() const override { return 90100; }
  double batchnormMinEpsilonCuDNN() const override { return 1e-5; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex current_device() const override { return current; }
  int getNumGPUs() const override { return kDevices; }
  DeviceIndex deviceCount() const override { return kDevices; }
  DeviceIndex getCurrentDevice() const override { return current; }
  void deviceSynchronize(DeviceIndex) const override {}
};

REGISTER_CUDA_HOOKS(CUDAHooks)

} // namespace at
