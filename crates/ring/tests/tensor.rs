//! Tensor operations against element-by-element definitions, on small random shapes and on sizes that go parallel.

use proptest::prelude::*;
use veiltune_ring::{Error, Ring, broadcast_shape, matmul_nt_shape, matmul_shape};

/// Every index of a tensor of this shape, in row-major order.
fn indices(dims: &[usize]) -> Vec<Vec<usize>> {
    dims.iter().fold(vec![vec![]], |all, &d| {
        all.iter()
            .flat_map(|head| (0..d).map(move |i| [&head[..], &[i]].concat()))
            .collect()
    })
}

/// The element at `index`, which may have more dimensions than `x`: those broadcast.
fn at(x: &Ring, index: &[usize]) -> u64 {
    let index = &index[index.len() - x.dims().len()..];
    let place = x
        .dims()
        .iter()
        .zip(index)
        .fold(0, |p, (&d, &i)| p * d + if d == 1 { 0 } else { i });
    x.as_slice()[place]
}

/// The tensor of shape `dims` with `f` of every index.
fn naive(dims: &[usize], f: impl Fn(&[usize]) -> u64) -> Ring {
    Ring::new(dims, indices(dims).iter().map(|i| f(i)).collect()).unwrap()
}

#[track_caller]
fn assert_same(x: &Ring, y: &Ring) {
    assert_eq!(x.dims(), y.dims());
    assert!(x.as_slice() == y.as_slice(), "elements differ");
}

/// A tensor with distinct, full-width elements.
fn numbered(dims: &[usize], salt: u64) -> Ring {
    let n = dims.iter().product::<usize>() as u64;
    Ring::new(
        dims,
        (0..n)
            .map(|i| (i + salt).wrapping_mul(0x9e37_79b9_7f4a_7c15))
            .collect(),
    )
    .unwrap()
}

/// Words that are small, huge, or anything.
fn word() -> impl Strategy<Value = u64> {
    prop_oneof![Just(0), Just(1), Just(u64::MAX), Just(1 << 63), any::<u64>()]
}

fn filled(dims: Vec<usize>) -> impl Strategy<Value = Ring> {
    let n = dims.iter().product();
    proptest::collection::vec(word(), n..=n).prop_map(move |v| Ring::new(dims.as_slice(), v).unwrap())
}

fn shape() -> impl Strategy<Value = Vec<usize>> {
    proptest::collection::vec(0usize..6, 0..5)
}

/// A shape, and two that broadcast to it.
fn broadcastable() -> impl Strategy<Value = (Ring, Ring)> {
    let part = |dims: Vec<usize>| {
        let rank = dims.len();
        let ones = proptest::collection::vec(any::<bool>(), rank);
        (0..=rank, ones).prop_map(move |(from, ones)| {
            (from..rank)
                .map(|i| if ones[i] { 1 } else { dims[i] })
                .collect::<Vec<usize>>()
        })
    };
    shape()
        .prop_flat_map(move |dims| (part(dims.clone()), part(dims)))
        .prop_flat_map(|(a, b)| (filled(a), filled(b)))
}

proptest! {
    #[test]
    fn arithmetic_broadcasts((a, b) in broadcastable()) {
        let dims = broadcast_shape(a.dims(), b.dims()).unwrap();
        assert_same(&a.add(&b).unwrap(), &naive(&dims, |i| at(&a, i).wrapping_add(at(&b, i))));
        assert_same(&a.sub(&b).unwrap(), &naive(&dims, |i| at(&a, i).wrapping_sub(at(&b, i))));
        assert_same(&a.mul(&b).unwrap(), &naive(&dims, |i| at(&a, i).wrapping_mul(at(&b, i))));
        let mut c = a.broadcast_to(dims.as_slice()).unwrap();
        assert_same(&c, &naive(&dims, |i| at(&a, i)));
        c.add_assign(&b).unwrap();
        assert_same(&c, &a.add(&b).unwrap());
        c.sub_assign(&b).unwrap();
        assert_same(&c, &naive(&dims, |i| at(&a, i)));
        if a.dims() != dims {
            prop_assert!(a.clone().add_assign(&b).is_err());
            prop_assert!(a.clone().sub_assign(&b).is_err());
        }
    }

    #[test]
    fn scalars(a in shape().prop_flat_map(filled), k in word(), bits in 0u32..70) {
        let each = |f: &dyn Fn(u64) -> u64| naive(a.dims(), |i| f(at(&a, i)));
        assert_same(&a.neg(), &each(&|x| 0u64.wrapping_sub(x)));
        assert_same(&a.mul_scalar(k), &each(&|x| x.wrapping_mul(k)));
        assert_same(&a.add_scalar(k), &each(&|x| x.wrapping_add(k)));
        assert_same(&a.shl(bits), &each(&|x| ((x as u128) << bits) as u64));
        assert_same(&a.map(|x| x ^ k), &each(&|x| x ^ k));
    }

    #[test]
    fn permute_moves_every_element(
        (dims, order) in shape().prop_flat_map(|d| {
            let order: Vec<usize> = (0..d.len()).collect();
            (Just(d), Just(order).prop_shuffle())
        }),
    ) {
        let a = numbered(&dims, 0);
        let out: Vec<usize> = order.iter().map(|&d| dims[d]).collect();
        let back = |i: &[usize]| {
            let mut source = vec![0; i.len()];
            order.iter().zip(i).for_each(|(&d, &i)| source[d] = i);
            at(&a, &source)
        };
        assert_same(&a.permute(&order).unwrap(), &naive(&out, back));
    }

    #[test]
    fn pieces_along_a_dimension(
        (dims, dim) in proptest::collection::vec(0usize..6, 1..5).prop_flat_map(|d| { let n = d.len(); (Just(d), 0..n) }),
        cut in any::<proptest::sample::Index>(),
    ) {
        let a = numbered(&dims, 0);
        let size = dims[dim];
        let cut = cut.index(size + 1);
        let (head, tail) = (a.narrow(dim, 0, cut).unwrap(), a.narrow(dim, cut, size - cut).unwrap());
        let with = |n| { let mut d = dims.clone(); d[dim] = n; d };
        let shifted = |i: &[usize], by: usize| { let mut i = i.to_vec(); i[dim] += by; at(&a, &i) };
        assert_same(&head, &naive(&with(cut), |i| shifted(i, 0)));
        assert_same(&tail, &naive(&with(size - cut), |i| shifted(i, cut)));
        assert_same(&Ring::cat(&[&head, &tail], dim).unwrap(), &a);
        prop_assert!(a.narrow(dim, cut, size - cut + 1).is_err());

        let sum = |i: &[usize]| (0..size).fold(0u64, |s, j| s.wrapping_add(shifted(i, j)));
        assert_same(&a.sum(dim).unwrap(), &naive(&with(1), sum));
    }
}

/// The same through a pool of three threads as through one, at sizes that are split among them.
#[test]
fn threads_change_nothing() {
    let pool = |n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
    let work = || {
        let a = numbered(&[70, 30, 41], 1);
        let (b, row, column) = (
            numbered(&[70, 30, 41], 2),
            numbered(&[41], 3),
            numbered(&[70, 1, 1], 4),
        );
        let mut sum = a.clone();
        sum.add_assign(&row).unwrap();
        [
            a.mul(&b).unwrap(),
            a.add(&row).unwrap(),
            column.sub(&a).unwrap(),
            a.mul(&numbered(&[], 5)).unwrap(),
            sum,
            a.map(|x| x >> 7),
            a.permute(&[2, 0, 1]).unwrap(),
            a.transpose(1, 2).unwrap(),
            a.transpose(0, 1).unwrap(),
            a.narrow(1, 3, 26).unwrap(),
            Ring::cat(&[&a, &b, &a.narrow(0, 3, 9).unwrap()], 0).unwrap(),
            Ring::cat(&[&a, &b], 1).unwrap(),
            a.broadcast_to([2, 70, 30, 41]).unwrap(),
            Ring::cat(&[&a, &b], 0).unwrap().sum(0).unwrap(),
            numbered(&[60_000, 2], 6).sum(1).unwrap(),
        ]
    };
    for (one, three) in pool(1).install(work).iter().zip(&pool(3).install(work)) {
        assert_same(one, three);
    }
}

#[test]
fn storage_is_shared_until_written() {
    let a = numbered(&[4, 3], 0);
    let view = a.reshape([2, 6]).unwrap().narrow(0, 1, 1).unwrap();
    assert_eq!(view.as_slice().as_ptr(), a.as_slice()[6..].as_ptr());
    let mut written = view.clone();
    written.make_mut()[0] = 7;
    assert_same(&a, &numbered(&[4, 3], 0));
    assert_eq!(written.as_slice()[0], 7);
    assert_eq!(view.into_vec(), a.as_slice()[6..]);

    let at = a.as_slice().as_ptr();
    let mut last = a.narrow(0, 2, 2).unwrap();
    drop(a);
    last.make_mut()[0] = 1;
    assert_eq!(
        last.as_slice().as_ptr(),
        at.wrapping_add(6),
        "alone again, so written in place"
    );
    assert_eq!(last.into_vec()[0], 1);
    let whole = numbered(&[5], 0);
    let at = whole.as_slice().as_ptr();
    let vec = whole.into_vec();
    assert_eq!(vec.as_ptr(), at);
}

#[test]
fn misuse_is_an_error() {
    let a = Ring::zeros([2, 3]);
    assert!(matches!(Ring::new([2, 3], vec![0; 5]), Err(Error::Shape { .. })));
    assert!(matches!(
        Ring::new([usize::MAX, 2, 0], vec![]),
        Err(Error::Shape { .. })
    ));
    assert!(matches!(a.reshape([7]), Err(Error::Shape { .. })));
    assert!(matches!(a.add(&Ring::zeros([2])), Err(Error::Shape { .. })));
    assert!(matches!(a.permute(&[0, 0]), Err(Error::Shape { .. })));
    assert!(matches!(a.transpose(0, 2), Err(Error::Range { index: 2, .. })));
    assert!(matches!(a.narrow(0, 1, usize::MAX), Err(Error::Range { .. })));
    assert!(matches!(a.broadcast_to([3]), Err(Error::Shape { .. })));
    assert!(matches!(
        a.broadcast_to([usize::MAX, 2, 3]),
        Err(Error::Shape { .. })
    ));
    assert!(matches!(Ring::cat(&[], 0), Err(Error::Shape { .. })));
    assert!(matches!(
        Ring::cat(&[&a, &Ring::zeros([3, 2])], 0),
        Err(Error::Shape { .. })
    ));
    assert!(matches!(
        Ring::cat(&[&a, &Ring::zeros([2])], 1),
        Err(Error::Shape { .. })
    ));
    assert!(matches!(a.matmul(&a), Err(Error::Shape { op: "matmul", .. })));
    assert!(matches!(a.matmul_nt(&Ring::zeros([3])), Err(Error::Shape { .. })));
}

#[test]
fn debug_shows_no_value() {
    assert_eq!(format!("{:?}", Ring::full([2, 1], 123_456_789)), "Ring([2, 1])");
}

#[test]
fn product_shapes() {
    assert_eq!(matmul_shape(&[2, 1, 3, 4], &[5, 4, 6]).unwrap(), [2, 5, 3, 6]);
    assert_eq!(matmul_nt_shape(&[7, 3, 4], &[6, 4]).unwrap(), [7, 3, 6]);
    assert!(matmul_shape(&[3, 4], &[6, 4]).is_err());
    assert!(matmul_nt_shape(&[3, 4], &[4, 6]).is_err());
    assert!(matmul_shape(&[2, 3, 4], &[3, 4, 6]).is_err());
    assert!(matmul_shape(&[4], &[4, 6]).is_err());
}
