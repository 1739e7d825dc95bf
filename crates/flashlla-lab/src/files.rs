//! Safetensors files: tensors in, tensors out.
//!
//! Reading trusts nothing. The header's claims are held against the file's length before anything is allocated, and only the
//! tensors asked for are read, straight into the type wanted. Writing goes to a temporary file beside the target that takes
//! its place in one step, so a target is either the old file or the whole new one.

use crate::{Error, Result};
use bytemuck::Pod;
use flashlla::{Element, Tensor, bf16, f16};
use safetensors::{Dtype, tensor::Metadata, tensor::TensorInfo};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

#[cfg(target_endian = "big")]
compile_error!("safetensors files are little-endian and are read and written here without swapping bytes");

/// The format's own limit on the size of a header.
const MAX_HEADER: u64 = 100_000_000;

/// A type that files hold.
pub trait Stored: Element + Pod {
    /// Its name in a file.
    const DTYPE: Dtype;
}
impl Stored for f64 {
    const DTYPE: Dtype = Dtype::F64;
}
impl Stored for f32 {
    const DTYPE: Dtype = Dtype::F32;
}
impl Stored for bf16 {
    const DTYPE: Dtype = Dtype::BF16;
}
impl Stored for f16 {
    const DTYPE: Dtype = Dtype::F16;
}

/// A safetensors file whose header has been read and found consistent.
#[derive(Debug)]
pub struct TensorFile<R> {
    source: R,
    name: String,
    header: Metadata,
    /// Where the first tensor begins.
    start: u64,
}

impl TensorFile<File> {
    /// Opens a file and reads its header.
    pub fn open(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        let file = File::open(path).map_err(|error| Error::failed(format_args!("{name}: {error}")))?;
        let is_dir = file.metadata().is_ok_and(|m| m.is_dir());
        if is_dir {
            return Err(Error::failed(format_args!("{name}: is a folder; a safetensors file is wanted")));
        }
        Self::new(file, name)
    }
}

impl<R: Read + Seek> TensorFile<R> {
    /// Reads the header from the beginning of `source`; `name` is what errors call it.
    pub fn new(mut source: R, name: impl Into<String>) -> Result<Self> {
        let name = name.into();
        let (header, start) = read_header(&mut source)
            .map_err(|reason| Error::failed(format_args!("{name}: not a safetensors file: {reason}")))?;
        Ok(Self { source, name, header, start })
    }

    /// What errors call the file.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// An error about this file.
    pub fn error(&self, message: impl std::fmt::Display) -> Error {
        Error::failed(format_args!("{}: {message}", self.name))
    }

    /// The text under a key of the file's metadata.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.header.metadata().as_ref()?.get(key).map(String::as_str)
    }

    /// Whether there is a tensor of that name.
    pub fn has(&self, tensor: &str) -> bool {
        self.header.info(tensor).is_some()
    }

    /// A tensor's type and shape.
    pub fn info(&self, tensor: &str) -> Result<(Dtype, &[usize])> {
        match self.header.info(tensor) {
            Some(info) => Ok((info.dtype, &info.shape)),
            None => {
                let mut names = self.header.offset_keys();
                names.truncate(12);
                let names = if names.is_empty() { "nothing".into() } else { names.join(", ") };
                Err(self.error(format_args!("{tensor}: no such tensor; the file holds {names}")))
            }
        }
    }

    /// Reads a tensor of any float type, rounded to `T`. A finite value too large for `T` is an error.
    pub fn read<T: Element>(&mut self, tensor: &str) -> Result<Tensor<T>> {
        let (dtype, _) = self.info(tensor)?;
        match dtype {
            Dtype::F64 => self.read_from::<f64, T>(tensor),
            Dtype::F32 => self.read_from::<f32, T>(tensor),
            Dtype::BF16 => self.read_from::<bf16, T>(tensor),
            Dtype::F16 => self.read_from::<f16, T>(tensor),
            other => Err(self.error(format_args!(
                "{tensor}: type {other} is not allowed; it must be F64, F32, BF16 or F16"
            ))),
        }
    }

    fn read_from<S: Stored, T: Element>(&mut self, tensor: &str) -> Result<Tensor<T>> {
        let TensorInfo { shape, data_offsets: (begin, end), .. } =
            self.header.info(tensor).expect("read() looked it up").clone();
        let mut remaining = (end - begin) / size_of::<S>();
        let mut values = Vec::new();
        values
            .try_reserve_exact(remaining)
            .map_err(|_| self.error(format_args!("{tensor}: {remaining} elements do not fit into memory")))?;
        let failed =
            |name: &str, error: std::io::Error| Error::failed(format_args!("{name}: {tensor}: {error}"));
        self.source
            .seek(SeekFrom::Start(self.start + begin as u64))
            .map_err(|error| failed(&self.name, error))?;
        let mut buffer = vec![S::default(); remaining.min(1 << 15)];
        while remaining > 0 {
            let part = &mut buffer[..remaining.min(1 << 15)];
            self.source
                .read_exact(bytemuck::cast_slice_mut(part))
                .map_err(|error| failed(&self.name, error))?;
            for &value in part.iter() {
                let rounded = T::from_real(value.to_real::<f64>());
                if !rounded.is_finite() && value.is_finite() {
                    return Err(self.error(format_args!(
                        "{tensor}: {:e} is too large for {}; choose a wider --dtype",
                        value.to_real::<f64>(),
                        T::NAME
                    )));
                }
                values.push(rounded);
            }
            remaining -= part.len();
        }
        Ok(Tensor::new(values, &shape))
    }
}

/// Reads and checks the header: what it says, and where the tensors begin.
fn read_header<R: Read + Seek>(source: &mut R) -> Result<(Metadata, u64), String> {
    let io = |error: std::io::Error| error.to_string();
    let len = source.seek(SeekFrom::End(0)).map_err(io)?;
    source.seek(SeekFrom::Start(0)).map_err(io)?;
    if len < 8 {
        return Err(format!("its {len} bytes cannot hold a header"));
    }
    let mut size = [0; 8];
    source.read_exact(&mut size).map_err(io)?;
    let size = u64::from_le_bytes(size);
    if size > len - 8 || size > MAX_HEADER {
        return Err(format!("a header of {size} bytes is announced in a file of {len}"));
    }
    let mut json = vec![0; size as usize];
    source.read_exact(&mut json).map_err(io)?;
    // Deserialising checks that the tensors lie end to end and are as long as their shapes say.
    let header: Metadata = serde_json::from_slice(&json).map_err(|error| format!("its header: {error}"))?;
    let expected = 8 + size + header.data_len() as u64;
    if len != expected {
        let what = if len < expected { "truncated" } else { "longer than its header says" };
        return Err(format!("it is {what} ({len} bytes instead of {expected})"));
    }
    Ok((header, 8 + size))
}

/// A tensor to be written.
#[derive(Debug)]
pub struct Entry<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its sizes.
    pub shape: Vec<usize>,
    dtype: Dtype,
    bytes: &'a [u8],
}

impl<'a> Entry<'a> {
    /// Elements in row-major order. Panics unless there are as many as the shape has.
    pub fn new<T: Stored>(name: &'a str, shape: &[usize], data: &'a [T]) -> Self {
        assert_eq!(data.len(), shape.iter().product::<usize>(), "elements of {name} for shape {shape:?}");
        Self { name, shape: shape.to_vec(), dtype: T::DTYPE, bytes: bytemuck::cast_slice(data) }
    }
}

/// A file about to be written.
#[derive(Debug)]
pub struct Target {
    path: PathBuf,
    folder: PathBuf,
}

impl Target {
    /// Checks, before any work is done, that `path` can be written and is none of the files read.
    pub fn new(path: &Path, inputs: &[&Path]) -> Result<Self> {
        let fail =
            |reason: &dyn std::fmt::Display| Error::failed(format_args!("{}: {reason}", path.display()));
        // A link is followed, so that what it points to is replaced and not the link.
        let path = match path.canonicalize() {
            Ok(existing) => {
                if !existing.is_file() {
                    return Err(fail(&"is not a regular file; name a file to write"));
                }
                if inputs.iter().any(|input| input.canonicalize().is_ok_and(|input| input == existing)) {
                    return Err(Error::usage(format_args!(
                        "--output: {} is the input; name another file to write",
                        path.display()
                    )));
                }
                existing
            }
            Err(_) if path.file_name().is_none() => return Err(fail(&"is not a file name")),
            Err(_) => path.to_path_buf(),
        };
        let folder = match path.parent() {
            Some(parent) if parent != Path::new("") => parent.to_path_buf(),
            _ => PathBuf::from("."),
        };
        let target = Self { path, folder };
        target.temporary()?;
        Ok(target)
    }

    /// A temporary file beside the target, which goes when it is dropped.
    fn temporary(&self) -> Result<tempfile::NamedTempFile> {
        let mut builder = tempfile::Builder::new();
        builder.prefix(".flashlla-");
        #[cfg(unix)]
        {
            // What any new file gets, less the umask; a temporary one would otherwise be private.
            use std::os::unix::fs::PermissionsExt;
            builder.permissions(std::fs::Permissions::from_mode(0o666));
        }
        builder.tempfile_in(&self.folder).map_err(|error| self.failed(error))
    }

    fn failed(&self, error: std::io::Error) -> Error {
        // tempfile adds the path of the temporary file, of which the user knows nothing.
        let reason = match error.raw_os_error() {
            Some(code) => std::io::Error::from_raw_os_error(code).to_string(),
            None => error.kind().to_string(),
        };
        Error::failed(format_args!("{}: cannot write: {reason}", self.path.display()))
    }

    /// Writes everything, and only then puts it in the target's place.
    pub fn write(&self, mut entries: Vec<Entry>, metadata: &BTreeMap<String, String>) -> Result<()> {
        // Widest types first keeps every tensor aligned; names in order keep the bytes the same from run to run.
        entries.sort_by(|a, b| b.dtype.cmp(&a.dtype).then(a.name.cmp(b.name)));
        #[derive(serde::Serialize)]
        struct Header<'a> {
            __metadata__: &'a BTreeMap<String, String>,
            #[serde(flatten)]
            tensors: BTreeMap<&'a str, TensorInfo>,
        }
        let mut end = 0;
        let mut header = Header { __metadata__: metadata, tensors: BTreeMap::new() };
        for entry in &entries {
            let begin = end;
            end += entry.bytes.len();
            let (dtype, shape) = (entry.dtype, entry.shape.clone());
            header.tensors.insert(entry.name, TensorInfo { dtype, shape, data_offsets: (begin, end) });
        }
        let mut header = serde_json::to_vec(&header).map_err(Error::failed)?;
        header.resize(header.len().next_multiple_of(8), b' ');

        let temporary = self.temporary()?;
        let mut out = BufWriter::with_capacity(1 << 20, temporary.as_file());
        let written = (|| {
            out.write_all(&(header.len() as u64).to_le_bytes())?;
            out.write_all(&header)?;
            entries.iter().try_for_each(|entry| out.write_all(entry.bytes))?;
            out.flush()?;
            out.get_ref().sync_all()
        })();
        drop(out);
        written.map_err(|error| self.failed(error))?;
        temporary.persist(&self.path).map_err(|error| self.failed(error.error))?;
        Ok(())
    }
}
