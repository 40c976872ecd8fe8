//! Modules and their functions: the kernels of an image, for one GPU.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::{CStr, CString, c_char, c_int, c_uint};
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::ptx;

use super::device::{Device, config, max_shared_bytes};
use super::image::find_ptx;
use super::registry::{Handle, Registry};
use super::status::{Out, Outcome, Status, answer, put};

/// Shared memory that a kernel may have without asking, bytes.
const DEFAULT_SHARED_BYTES: u32 = 48 << 10;

/// A loaded image.
struct Module {
    functions: Vec<Handle>,
}

/// A kernel on one GPU.
pub struct Function {
    /// The GPU.
    pub device: &'static Device,
    module: Arc<ptx::Module>,
    index: usize,
    name: CString,
    /// What it may have beside its static shared memory, bytes.
    max_dynamic_bytes: AtomicU32,
}

static MODULES: Registry<Module> = Registry::new();
/// All functions.
pub static FUNCTIONS: Registry<Function> = Registry::new();

impl Function {
    /// Returns the kernel.
    pub fn kernel(&self) -> &ptx::Kernel {
        &self.module.kernels[self.index]
    }

    /// Returns the dynamic shared memory that a launch may ask for, bytes.
    pub fn max_dynamic_bytes(&self) -> u32 {
        self.max_dynamic_bytes.load(Ordering::Relaxed)
    }
}

/// Reads PTX, each text once: programs load the same image for each GPU and each engine.
fn parse(text: &str) -> Outcome<Arc<ptx::Module>> {
    static PARSED: Mutex<Option<HashMap<u64, Arc<ptx::Module>>>> = Mutex::new(None);
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    let mut parsed = PARSED.lock().unwrap_or_else(PoisonError::into_inner);
    match parsed.get_or_insert_default().entry(hasher.finish()) {
        Entry::Occupied(module) => Ok(Arc::clone(module.get())),
        Entry::Vacant(place) => {
            let module = ptx::Module::parse(text).map_err(|error| {
                eprintln!("emulated CUDA driver: PTX that is not understood: {error}");
                Status::INVALID_PTX
            })?;
            Ok(Arc::clone(place.insert(Arc::new(module))))
        }
    }
}

/// # Safety
/// As [`find_ptx`].
unsafe fn load(image: *const u8) -> Outcome<Handle> {
    let device = Device::current()?;
    // SAFETY: the caller's.
    let module = parse(&unsafe { find_ptx(image, config().capability)? })?;
    let mut functions = Vec::with_capacity(module.kernels.len());
    for (index, kernel) in module.kernels.iter().enumerate() {
        let function = Function {
            device,
            module: Arc::clone(&module),
            index,
            name: CString::new(kernel.name.as_str()).map_err(|_| Status::INVALID_PTX)?,
            max_dynamic_bytes: AtomicU32::new(
                DEFAULT_SHARED_BYTES.saturating_sub(kernel.static_shared_bytes),
            ),
        };
        functions.push(FUNCTIONS.enter(Arc::new(function)));
    }
    Ok(MODULES.enter(Arc::new(Module { functions })))
}

/// # Safety
/// As [`find_ptx`].
#[unsafe(no_mangle)]
unsafe extern "C" fn cuModuleLoadData(module: Out<'_, Handle>, image: *const u8) -> Status {
    // SAFETY: the caller's.
    answer(unsafe { load(image) }.and_then(|loaded| put(module, loaded)))
}

/// # Safety
/// `path` must be a text ended by 0, of a file that [`find_ptx`] can read.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuModuleLoad(module: Out<'_, Handle>, path: *const c_char) -> Status {
    // SAFETY: the caller's.
    let path = unsafe { CStr::from_ptr(path) }.to_string_lossy();
    answer(
        fs::read(&*path)
            .map_err(|_| Status::FILE_NOT_FOUND)
            .and_then(|mut image| {
                image.push(0);
                // SAFETY: what the file has, and a 0.
                put(module, unsafe { load(image.as_ptr()) }?)
            }),
    )
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleUnload(module: Handle) -> Status {
    answer(MODULES.remove(module).and_then(|module| {
        module
            .functions
            .iter()
            .try_for_each(|&function| FUNCTIONS.remove(function).map(|_| ()))
    }))
}

/// # Safety
/// `name` must be a text ended by 0.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuModuleGetFunction(
    function: Out<'_, Handle>,
    module: Handle,
    name: *const c_char,
) -> Status {
    // SAFETY: the caller's.
    let name = unsafe { CStr::from_ptr(name) };
    answer(MODULES.get(module).and_then(|module| {
        let has_name = |handle: &&Handle| {
            FUNCTIONS
                .get(**handle)
                .is_ok_and(|function| *function.name == *name)
        };
        let found = module.functions.iter().find(has_name);
        put(function, *found.ok_or(Status::NOT_FOUND)?)
    }))
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleGetFunctionCount(count: Out<'_, c_uint>, module: Handle) -> Status {
    answer(
        MODULES
            .get(module)
            .and_then(|module| put(count, module.functions.len() as c_uint)),
    )
}

/// # Safety
/// `functions` must have room for `num_functions` handles.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuModuleEnumerateFunctions(
    functions: *mut Handle,
    num_functions: c_uint,
    module: Handle,
) -> Status {
    answer(MODULES.get(module).and_then(|module| {
        if functions.is_null() {
            return Err(Status::INVALID_VALUE);
        }
        for (i, &function) in module
            .functions
            .iter()
            .take(num_functions as usize)
            .enumerate()
        {
            // SAFETY: below `num_functions`.
            unsafe { functions.add(i).write(function) };
        }
        Ok(())
    }))
}

/// The name lives as long as the module.
#[unsafe(no_mangle)]
extern "C" fn cuFuncGetName(name: Out<'_, *const c_char>, function: Handle) -> Status {
    answer(
        FUNCTIONS
            .get(function)
            .and_then(|function| put(name, function.name.as_ptr())),
    )
}

/// Kernels are read with their module.
#[unsafe(no_mangle)]
extern "C" fn cuFuncLoad(function: Handle) -> Status {
    answer(FUNCTIONS.get(function).map(|_| ()))
}

/// `CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES`.
const MAX_DYNAMIC_SHARED: c_int = 8;

#[unsafe(no_mangle)]
extern "C" fn cuFuncGetAttribute(
    value: Out<'_, c_int>,
    attribute: c_int,
    function: Handle,
) -> Status {
    answer(FUNCTIONS.get(function).and_then(|function| {
        let kernel = function.kernel();
        let found = match attribute {
            // Threads of a block, shared memory, what PTX and machine code are for.
            0 => 1024,
            1 => kernel.static_shared_bytes as c_int,
            5 => kernel.architecture as c_int,
            6 => (10 * config().capability.0 + config().capability.1) as c_int,
            MAX_DYNAMIC_SHARED => function.max_dynamic_bytes() as c_int,
            _ => return Err(Status::NOT_SUPPORTED),
        };
        put(value, found)
    }))
}

#[unsafe(no_mangle)]
extern "C" fn cuFuncSetAttribute(function: Handle, attribute: c_int, value: c_int) -> Status {
    answer(FUNCTIONS.get(function).and_then(|function| {
        if attribute != MAX_DYNAMIC_SHARED {
            return Err(Status::NOT_SUPPORTED);
        }
        let most = max_shared_bytes() - function.kernel().static_shared_bytes;
        let wanted = u32::try_from(value).ok().filter(|&wanted| wanted <= most);
        function
            .max_dynamic_bytes
            .store(wanted.ok_or(Status::INVALID_VALUE)?, Ordering::Relaxed);
        Ok(())
    }))
}
