//! Tensors as this layer sees them: rows, an element type, a shape; outputs and views.

use std::fmt;

use crate::config::QuantKind;
use crate::device::{Columns, Float, Rows};

/// DLPack's element type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Element {
    pub code: u8,
    pub bits: u8,
    pub lanes: u16,
}

impl Element {
    pub const I32: Element = Element { code: 0, bits: 32, lanes: 1 };
    pub const I64: Element = Element { code: 0, bits: 64, lanes: 1 };
    pub const F32: Element = Element { code: 2, bits: 32, lanes: 1 };
    pub const F16: Element = Element { code: 2, bits: 16, lanes: 1 };
    pub const BF16: Element = Element { code: 4, bits: 16, lanes: 1 };
    pub const F8: Element = Element { code: 10, bits: 8, lanes: 1 };

    pub(super) fn word(self) -> u32 {
        self.code as u32 | (self.bits as u32) << 8 | (self.lanes as u32) << 16
    }
    /// Bytes of one element; 0 if it has no whole number of them.
    pub fn bytes(self) -> usize {
        let bits = self.bits as usize * self.lanes as usize;
        if bits.is_multiple_of(8) { bits / 8 } else { 0 }
    }
    pub(super) fn float(self) -> Option<Float> {
        [(Element::BF16, Float::Bf16), (Element::F16, Float::F16), (Element::F32, Float::F32)]
            .into_iter()
            .find(|(element, _)| *element == self)
            .map(|(_, float)| float)
    }
    /// What the scales of a quantisation are made of.
    pub(super) fn of_scales(quant: QuantKind) -> Element {
        if quant == QuantKind::Fp8Ue8m0 { Element::I32 } else { Element::F32 }
    }
    pub(super) fn of(float: Float) -> Element {
        match float {
            Float::Bf16 => Element::BF16,
            Float::F16 => Element::F16,
            Float::F32 => Element::F32,
        }
    }
}

impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.code {
            0 => "int",
            1 => "uint",
            2 => "float",
            4 => "bfloat",
            10 if self.bits == 8 => return f.write_str("float8 e4m3"),
            code => return write!(f, "DLPack type {code} of {} bits", self.bits),
        };
        write!(f, "{name}{}", self.bits)?;
        if self.lanes == 1 { Ok(()) } else { write!(f, "x{}", self.lanes) }
    }
}

/// A caller's tensor as rows: all dimensions but the last are counted together.
#[derive(Clone, Copy, Debug)]
pub struct Tensor {
    pub rows: Rows,
    pub ndim: usize,
    /// [ndim] sizes.
    pub dims: [i64; 3],
    pub element: Element,
}

impl Tensor {
    /// Elements of a row: 1 for a one-dimensional tensor.
    pub(super) fn columns(&self) -> usize {
        if self.ndim < 2 { 1 } else { self.dims[self.ndim - 1] as usize }
    }
}

/// A caller's tensor of 4-byte elements whose columns are contiguous: [rows, S], or [blocks, rows, S].
#[derive(Clone, Copy, Debug)]
pub struct ColumnTensor {
    pub columns: Columns,
    pub ndim: usize,
    pub dims: [i64; 3],
    pub element: Element,
}

/// Where an output is wanted.
#[derive(Clone, Copy, Debug, Default)]
pub enum Output {
    #[default]
    Nothing,
    View,
    Into(Tensor),
    Columns(ColumnTensor),
}

/// A view to hand to the caller.
#[derive(Clone, Copy, Debug)]
pub struct View {
    pub address: usize,
    pub element: Element,
    pub ndim: usize,
    pub dims: [i64; 3],
    /// In elements.
    pub strides: [i64; 3],
}

impl View {
    /// A compact view.
    pub(super) fn new(address: usize, element: Element, sizes: &[i64]) -> View {
        let mut view = View { address, element, ndim: sizes.len(), dims: [0; 3], strides: [0; 3] };
        let mut stride = 1;
        for (i, size) in sizes.iter().enumerate().rev() {
            (view.dims[i], view.strides[i]) = (*size, stride);
            stride *= size.max(&1);
        }
        view
    }
}
