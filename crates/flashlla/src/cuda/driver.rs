//! The few parts of the CUDA driver that the engine uses: a context, memory in stream order, modules, launches.

use crate::{Error, Result};
use cudarc::driver::sys::{self, CUresult};
use smallvec::SmallVec;
use std::ffi::{CString, c_void};
use std::ptr;
use std::sync::Arc;

/// A stream as the driver knows it; null is the default stream.
pub type RawStream = sys::CUstream;

fn failed(result: CUresult, doing: &str) -> Error {
    let mut name = ptr::null();
    // SAFETY: the driver is loaded (it gave the result); it returns a static string or leaves null.
    let name = unsafe {
        let _ = sys::cuGetErrorName(result, &mut name);
        if name.is_null() {
            format!("error {}", result as u32)
        } else {
            std::ffi::CStr::from_ptr(name).to_string_lossy().into_owned()
        }
    };
    let remedy = match result {
        CUresult::CUDA_ERROR_NO_DEVICE => "compute on a machine with an NVIDIA GPU, or on the CPU",
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
            "free GPU memory, or compute fewer heads or shorter sequences at a time"
        }
        CUresult::CUDA_ERROR_STUB_LIBRARY => {
            "the library found is the toolkit's stub; install the NVIDIA driver"
        }
        CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU | CUresult::CUDA_ERROR_INVALID_IMAGE => {
            "update the NVIDIA driver, or make the kernels anew with `cargo xtask kernels`"
        }
        _ => "see the NVIDIA driver's documentation of this error",
    };
    Error::Cuda { problem: format!("{name} while {doing}"), remedy: remedy.into() }
}

fn check(result: CUresult, doing: &str) -> Result<()> {
    if result == CUresult::CUDA_SUCCESS { Ok(()) } else { Err(failed(result, doing)) }
}

/// A GPU, opened: its primary context, which is also the one that PyTorch and others use, and a pool of memory of its own.
#[derive(Debug)]
pub struct Context {
    device: sys::CUdevice,
    raw: sys::CUcontext,
    pool: sys::CUmemoryPool,
    name: String,
    capability: (i32, i32),
    multiprocessors: usize,
    driver: u32,
}

// SAFETY: contexts and pools may be used from any thread; the driver does the locking.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// Opens the GPU numbered `ordinal`, if the driver is at least version `oldest`.
    pub fn open(ordinal: usize, oldest: u32) -> Result<Self> {
        // SAFETY: only loads a library.
        #[cfg(not(feature = "cuda-linked"))]
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::Cuda {
                problem: "the NVIDIA driver's library (libcuda.so.1) was not found".into(),
                remedy: "install the NVIDIA driver, or compute on the CPU".into(),
            });
        }
        // SAFETY: the calls that the driver asks for, in its order; every pointer is to a live local of the right type.
        unsafe {
            let mut driver = 0;
            check(sys::cuDriverGetVersion(&mut driver), "asking for the driver's version")?;
            let driver = u32::try_from(driver).unwrap_or(0);
            let version = |v: u32| format!("{}.{}", v / 1000, v % 1000 / 10);
            if driver < oldest {
                return Err(Error::Cuda {
                    problem: format!(
                        "the driver supports CUDA {}, the kernels need {} or later",
                        version(driver),
                        version(oldest)
                    ),
                    remedy: "update the NVIDIA driver".into(),
                });
            }
            check(sys::cuInit(0), "starting the driver")?;
            let mut count = 0;
            check(sys::cuDeviceGetCount(&mut count), "counting GPUs")?;
            if count == 0 {
                return Err(failed(CUresult::CUDA_ERROR_NO_DEVICE, "counting GPUs"));
            }
            if ordinal >= count as usize {
                return Err(Error::value("device", ordinal, format!("below the number of GPUs ({count})")));
            }
            let mut device = 0;
            check(sys::cuDeviceGet(&mut device, ordinal as i32), "opening the GPU")?;
            let attribute = |which| {
                let mut value = 0;
                check(sys::cuDeviceGetAttribute(&mut value, which, device), "asking for an attribute")
                    .map(|()| value)
            };
            use sys::CUdevice_attribute as A;
            let capability = (
                attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            );
            let multiprocessors = attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?.max(1) as usize;
            let mut name = [0i8; 256];
            check(sys::cuDeviceGetName(name.as_mut_ptr().cast(), 256, device), "asking for the GPU's name")?;
            let name = name.iter().take_while(|c| **c != 0).map(|&c| c as u8 as char).collect();
            let mut raw = ptr::null_mut();
            check(sys::cuDevicePrimaryCtxRetain(&mut raw, device), "opening the GPU's context")?;
            let pool = ptr::null_mut();
            let mut context = Self { device, raw, pool, name, capability, multiprocessors, driver };
            // Zero is a valid value of every field. cudarc's name for the second half of a location differs between its
            // versions of the interface; in memory it is always a type and a number.
            let mut props: sys::CUmemPoolProps = std::mem::zeroed();
            props.allocType = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
            let location = sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE as i32;
            (&raw mut props.location).cast::<[i32; 2]>().write([location, device]);
            let entered = context.enter()?;
            let mut pool = ptr::null_mut();
            check(sys::cuMemPoolCreate(&mut pool, &props), "making a memory pool")?;
            // Keep what was freed for the next call instead of giving it back at every synchronisation.
            let mut keep = u64::MAX;
            let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
            check(
                sys::cuMemPoolSetAttribute(pool, attribute, (&raw mut keep).cast()),
                "setting up a memory pool",
            )?;
            drop(entered);
            context.pool = pool;
            Ok(context)
        }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn capability(&self) -> (i32, i32) {
        self.capability
    }

    pub fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }

    pub fn driver(&self) -> u32 {
        self.driver
    }

    /// Makes the context current on this thread until the guard is dropped, and then whichever was before.
    pub fn enter(&self) -> Result<Entered> {
        // SAFETY: the context is retained as long as `self` lives, and guards do not outlive the calls they are made for.
        check(unsafe { sys::cuCtxPushCurrent_v2(self.raw) }, "entering the GPU's context")?;
        Ok(Entered(std::marker::PhantomData))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: what was made from the context keeps it alive through an `Arc`, so nothing uses it any more.
        unsafe {
            if !self.pool.is_null()
                && let Ok(_entered) = self.enter()
            {
                let _ = sys::cuMemPoolDestroy(self.pool);
            }
            let _ = sys::cuDevicePrimaryCtxRelease_v2(self.device);
        }
    }
}

/// While it lives, the context is current on the thread that made it.
pub struct Entered(std::marker::PhantomData<*const ()>);

impl Drop for Entered {
    fn drop(&mut self) {
        let mut old = ptr::null_mut();
        // SAFETY: undoes the push that made the guard.
        let _ = unsafe { sys::cuCtxPopCurrent_v2(&mut old) };
    }
}

/// A stream of the engine's own, which does not wait for the default stream.
#[derive(Debug)]
pub struct Stream {
    raw: RawStream,
    context: Arc<Context>,
}

// SAFETY: the driver allows the use of a stream from any thread.
unsafe impl Send for Stream {}

impl Stream {
    pub fn new(context: &Arc<Context>) -> Result<Self> {
        let _entered = context.enter()?;
        let mut raw = ptr::null_mut();
        let flag = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the context is current.
        check(unsafe { sys::cuStreamCreate(&mut raw, flag) }, "making a stream")?;
        Ok(Self { raw, context: context.clone() })
    }

    pub fn raw(&self) -> RawStream {
        self.raw
    }

    /// Waits until everything in the stream is done.
    pub fn synchronize(&self) -> Result<()> {
        let _entered = self.context.enter()?;
        // SAFETY: the stream is alive.
        check(unsafe { sys::cuStreamSynchronize(self.raw) }, "computing")
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Ok(_entered) = self.context.enter() {
            // SAFETY: the stream is alive, and the driver lets its work finish.
            let _ = unsafe { sys::cuStreamDestroy_v2(self.raw) };
        }
    }
}

/// Device memory that is taken and given back in the order of a stream: valid for the work put into the stream between.
pub struct Memory<'a> {
    ptr: u64,
    bytes: usize,
    stream: RawStream,
    context: &'a Context,
}

impl<'a> Memory<'a> {
    /// At least one byte, aligned to 256. The context must be current.
    pub fn new(context: &'a Context, stream: RawStream, bytes: usize) -> Result<Self> {
        let mut ptr = 0;
        // SAFETY: the pool belongs to the context, which is current; the caller vouches for the stream.
        let result = unsafe { sys::cuMemAllocFromPoolAsync(&mut ptr, bytes.max(1), context.pool, stream) };
        if result != CUresult::CUDA_SUCCESS {
            return Err(failed(result, &format!("taking {bytes} bytes of GPU memory")));
        }
        Ok(Self { ptr, bytes, stream, context })
    }

    pub fn ptr(&self) -> u64 {
        self.ptr
    }

    /// Copies from the host. The source may be changed as soon as this returns.
    pub fn upload<T: Copy>(&self, from: &[T]) -> Result<()> {
        let bytes = size_of_val(from);
        assert!(bytes <= self.bytes, "room for the upload");
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the device memory has that many bytes. The source is pageable memory, which the driver copies out before
        // it returns.
        let result = unsafe { sys::cuMemcpyHtoDAsync_v2(self.ptr, from.as_ptr().cast(), bytes, self.stream) };
        check(result, "copying to the GPU")
    }

    /// Copies to the host; done when the stream has been synchronised.
    ///
    /// # Safety
    /// `to` must stay where it is, untouched, until then.
    pub unsafe fn download<T: Copy>(&self, to: &mut [T]) -> Result<()> {
        let bytes = size_of_val(to);
        assert!(bytes <= self.bytes, "as much as there is");
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the device memory has that many bytes; the caller keeps the destination.
        let result =
            unsafe { sys::cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), self.ptr, bytes, self.stream) };
        check(result, "copying from the GPU")
    }
}

impl Drop for Memory<'_> {
    fn drop(&mut self) {
        if let Ok(_entered) = self.context.enter() {
            // SAFETY: taken from the pool in this stream and not used by any work put into it later.
            let _ = unsafe { sys::cuMemFreeAsync(self.ptr, self.stream) };
        }
    }
}

/// Device memory of its own, valid in every stream until it is dropped, which waits for the GPU.
#[derive(Debug)]
pub struct Allocation {
    ptr: u64,
    context: Arc<Context>,
}

impl Allocation {
    /// At least one byte, aligned to 256, all zero.
    pub fn zeroed(context: &Arc<Context>, bytes: usize) -> Result<Self> {
        let _entered = context.enter()?;
        let mut ptr = 0;
        // SAFETY: the context is current.
        let result = unsafe { sys::cuMemAlloc_v2(&mut ptr, bytes.max(1)) };
        if result != CUresult::CUDA_SUCCESS {
            return Err(failed(result, &format!("taking {bytes} bytes of GPU memory")));
        }
        let this = Self { ptr, context: context.clone() };
        // SAFETY: just allocated with that many bytes. The default stream is waited for: others do not wait for it.
        let result = unsafe {
            check(sys::cuMemsetD8_v2(ptr, 0, bytes.max(1)), "setting GPU memory")
                .and_then(|()| check(sys::cuStreamSynchronize(ptr::null_mut()), "setting GPU memory"))
        };
        result.map(|()| this)
    }

    pub fn ptr(&self) -> u64 {
        self.ptr
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        if let Ok(_entered) = self.context.enter() {
            // SAFETY: allocated by `zeroed`; freeing waits for what the GPU still does with it.
            let _ = unsafe { sys::cuMemFree_v2(self.ptr) };
        }
    }
}

/// Copies `rows` rows of `bytes` bytes, each `pitch` bytes after the one before, in the order of the stream. The context must be
/// current.
///
/// # Safety
/// All must lie in device memory that may be used in this stream; the two sides must not overlap.
pub unsafe fn copy_rows(
    from: u64,
    to: u64,
    bytes: usize,
    rows: usize,
    pitch: usize,
    stream: RawStream,
) -> Result<()> {
    if bytes * rows == 0 {
        return Ok(());
    }
    let copy = sys::CUDA_MEMCPY2D {
        srcXInBytes: 0,
        srcY: 0,
        srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
        srcHost: ptr::null(),
        srcDevice: from,
        srcArray: ptr::null_mut(),
        srcPitch: pitch,
        dstXInBytes: 0,
        dstY: 0,
        dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
        dstHost: ptr::null_mut(),
        dstDevice: to,
        dstArray: ptr::null_mut(),
        dstPitch: pitch,
        WidthInBytes: bytes,
        Height: rows,
    };
    // SAFETY: the caller's.
    check(unsafe { sys::cuMemcpy2DAsync_v2(&copy, stream) }, "copying GPU memory")
}

/// Sets `words` 32-bit words at `ptr` in the order of the stream. The context must be current.
///
/// # Safety
/// They must lie in device memory that may be written in this stream.
pub unsafe fn fill(ptr: u64, value: u32, words: usize, stream: RawStream) -> Result<()> {
    if words == 0 {
        return Ok(());
    }
    // SAFETY: the caller's.
    check(unsafe { sys::cuMemsetD32Async(ptr, value, words, stream) }, "setting GPU memory")
}

/// Copies to `ptr` in the order of the stream; the source may be changed when this returns. The context must be current.
///
/// # Safety
/// There must be room at `ptr` in device memory that may be written in this stream.
pub unsafe fn upload<T: Copy>(ptr: u64, from: &[T], stream: RawStream) -> Result<()> {
    if from.is_empty() {
        return Ok(());
    }
    // SAFETY: the caller's; pageable memory is copied out before the driver returns.
    let result = unsafe { sys::cuMemcpyHtoDAsync_v2(ptr, from.as_ptr().cast(), size_of_val(from), stream) };
    check(result, "copying to the GPU")
}

/// A loaded kernel.
#[derive(Debug)]
pub struct Function {
    raw: sys::CUfunction,
    module: sys::CUmodule,
    context: Arc<Context>,
    name: String,
}

// SAFETY: modules and functions may be used from any thread.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

impl Function {
    /// Loads a cubin and finds its entry; `name` is the kernel's in messages.
    pub fn load(context: &Arc<Context>, cubin: &[u8], entry: &str, name: &str) -> Result<Self> {
        let _entered = context.enter()?;
        let mut module = ptr::null_mut();
        // SAFETY: the image is a complete cubin (bundles hold nothing else); the driver checks it and copies it.
        let result = unsafe { sys::cuModuleLoadData(&mut module, cubin.as_ptr().cast()) };
        check(result, &format!("loading {name}"))?;
        let mut function = Self { raw: ptr::null_mut(), module, context: context.clone(), name: name.into() };
        let entry = CString::new(entry).expect("names hold no 0");
        // SAFETY: the module was just loaded.
        let result = unsafe { sys::cuModuleGetFunction(&mut function.raw, module, entry.as_ptr()) };
        check(result, &format!("looking for {entry:?} in {name}"))?;
        Ok(function)
    }

    /// The kernel's name in the bundle's index.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Puts a launch into the stream. The context must be current.
    ///
    /// # Safety
    /// The arguments must be those that the kernel takes, and its accesses within live device memory.
    pub unsafe fn launch(&self, grid: [u32; 3], arguments: &Arguments, stream: RawStream) -> Result<()> {
        let mut pointers: SmallVec<[*mut c_void; ARGUMENTS]> =
            arguments.0.iter().map(|x| ptr::from_ref(x).cast_mut().cast()).collect();
        // The thread count inside a tile block is the compiler's business: a block is launched as 1 x 1 x 1.
        // SAFETY: the pointers are to 8 live bytes each, of which the driver reads as many as the parameter has.
        let result = unsafe {
            sys::cuLaunchKernel(
                self.raw,
                grid[0],
                grid[1],
                grid[2],
                1,
                1,
                1,
                0,
                stream,
                pointers.as_mut_ptr(),
                ptr::null_mut(),
            )
        };
        // Words are put together only for an error: this is on the way of every launch.
        if result == CUresult::CUDA_SUCCESS {
            return Ok(());
        }
        Err(failed(result, &format!("launching {}", self.name)))
    }
}

impl Drop for Function {
    fn drop(&mut self) {
        if let Ok(_entered) = self.context.enter() {
            // SAFETY: loaded by `load`, and nobody can launch it any more.
            let _ = unsafe { sys::cuModuleUnload(self.module) };
        }
    }
}

/// As many as any kernel takes; more would go to the heap.
const ARGUMENTS: usize = 64;

/// The arguments of a launch, in order: 8 bytes for each, little-endian, whatever its size.
#[derive(Debug, Clone, Default)]
pub struct Arguments(SmallVec<[u64; ARGUMENTS]>);

impl Arguments {
    pub fn new() -> Self {
        Self::default()
    }

    /// Device addresses.
    pub fn pointers<const N: usize>(mut self, pointers: [u64; N]) -> Self {
        self.0.extend(pointers);
        self
    }

    /// 32-bit integers.
    pub fn i32s<const N: usize>(mut self, values: [i32; N]) -> Self {
        self.0.extend(values.map(|x| u64::from(x as u32)));
        self
    }

    /// 64-bit integers.
    pub fn i64s<const N: usize>(mut self, values: [i64; N]) -> Self {
        self.0.extend(values.map(|x| x as u64));
        self
    }

    /// A 32-bit float.
    pub fn f32(mut self, value: f32) -> Self {
        self.0.push(u64::from(value.to_bits()));
        self
    }

    /// Those of another list.
    pub fn then(mut self, others: &Self) -> Self {
        self.0.extend_from_slice(&others.0);
        self
    }
}

#[cfg(not(target_endian = "little"))]
compile_error!("feature cuda: launches are laid out for little-endian machines");
