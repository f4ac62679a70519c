//! The guest of a real Firecracker: no kernel, but a program that writes and verifies 64 MiB, in an
//! ELF image that Firecracker starts as one.
//!
//! Invariant: all 512 words of a page hold where they lie and the number of the round in which they
//! were written, so that a page that is missing, old, or another's is found in the next round. In
//! each round the guest goes over all pages, in an order that no prefetching follows, compares the
//! words of the round before, and writes those of this one. Then it prints a line to the first
//! serial port, with how many rounds it has done and how many words were wrong so far, both in
//! hexadecimal.
//!
//! It works in ring 3, because software virtualisation is slow in ring 0.

use std::arch::global_asm;
use std::io;
use std::path::Path;

use crate::support::PAGE;

/// What is written, from here on.
const BASE: u64 = 32 << 20;
const PAGES: u64 = 64 << 8;
/// Guest RAM, in MiB.
pub(crate) const MEMORY_MIB: u64 = 128;

/// Where the image is loaded: the first address that Firecracker takes.
const AT: u64 = 1 << 20;
/// Where the stack begins, behind the image.
const STACK: u64 = AT + (64 << 10);

/// Writes the image of the guest.
pub(crate) fn write_image(path: &Path) -> io::Result<()> {
    let (start, end) = (&raw const firecracker_guest_start, &raw const firecracker_guest_end);
    // SAFETY: both lie in the same read-only section, the second behind the first.
    let code = unsafe { std::slice::from_raw_parts(start, end.offset_from(start) as usize) };
    let mut image = elf_header(code.len() as u64);
    image.resize(PAGE as usize, 0);
    image.extend(code);
    std::fs::write(path, image)
}

/// That of an executable of 64 bits with one segment, and the header of this one, which lies a page
/// behind the start of the file.
fn elf_header(length: u64) -> Vec<u8> {
    let mut header = b"\x7fELF\x02\x01\x01".to_vec();
    header.resize(16, 0);
    let mut add = |value: u64, bytes: usize| header.extend(&value.to_le_bytes()[..bytes]);
    add(2, 2); // an executable
    add(62, 2); // x86-64
    add(1, 4);
    add(AT, 8); // where it is entered
    add(64, 8); // the segment's header
    add(0, 8); // no sections
    add(0, 4);
    add(64, 2);
    add(56, 2);
    add(1, 2); // segments
    add(0, 6);
    add(1, 4); // to be loaded
    add(7, 4); // readable, writable and executable
    add(PAGE, 8); // in the file
    add(AT, 8);
    add(AT, 8);
    add(length, 8);
    add(length, 8);
    add(PAGE, 8);
    header
}

unsafe extern "C" {
    static firecracker_guest_start: u8;
    static firecracker_guest_end: u8;
}

global_asm!(
    r#"
.pushsection .rodata.firecracker_guest, "a", @progbits
.balign 16
.global firecracker_guest_start
.hidden firecracker_guest_start
.global firecracker_guest_end
.hidden firecracker_guest_end

# In long mode, in ring 0, without interrupts; the first GiB is mapped where it lies.
firecracker_guest_start:
    cli
    mov esp, {stack}
    mov rax, cr3                    # what is mapped is for ring 3 too
    mov rbx, rax
    or qword ptr [rbx], 4
    mov rbx, [rbx]
    and rbx, -4096
    or qword ptr [rbx], 4
    mov rbx, [rbx]
    and rbx, -4096
    mov ecx, 512
22: or qword ptr [rbx + 8 * rcx - 8], 4
    dec ecx
    jnz 22b
    mov cr3, rax
    lea rax, [rip + 12f]
    mov [rip + 13f + 2], rax
    lgdt [rip + 13f]
    push 0x1b                       # the stack of ring 3
    push {stack}
    push 0x3002                     # which may use ports
    push 0x23
    lea rax, [rip + 2f]
    push rax
    iretq

# r12: rounds done; r13: wrong words; rax and rdx: the keys of the round before and of this one.
2:  xor r12d, r12d
    xor r13d, r13d
    movabs r14, 0x9e3779b97f4a7c15
3:  mov rax, r12
    imul rax, r14
    lea rdx, [rax + r14]
    xor ecx, ecx
4:  imul ebx, ecx, 0x9e37           # a page, and no page twice: the factor is odd
    and ebx, {pages} - 1
    shl rbx, 12
    add rbx, {base}
    lea rsi, [rbx + 4096]
5:  mov rdi, rbx
    xor rdi, rax
    test r12, r12                   # nothing was written before the first
    jz 6f
    cmp [rbx], rdi
    je 6f
    inc r13
6:  mov rdi, rbx
    xor rdi, rdx
    mov [rbx], rdi
    add rbx, 8
    cmp rbx, rsi
    jb 5b
    inc ecx
    cmp ecx, {pages}
    jb 4b
    inc r12
    lea rsi, [rip + 14f]
    mov rbx, r12
    call 7f
    lea rsi, [rip + 15f]
    mov rbx, r13
    call 7f
    mov al, 10
    call 21f
    jmp 3b

7:  lodsb                           # rsi: a word, then rbx as a number
    test al, al
    jz 8f
    call 21f
    jmp 7b
8:  mov ecx, 16
9:  rol rbx, 4
    mov eax, ebx
    and eax, 15
    add eax, '0'
    cmp eax, '9'
    jbe 20f
    add eax, 'a' - '9' - 1
20: call 21f
    dec ecx
    jnz 9b
    ret

21: mov edi, eax
    mov edx, 0x3fd
16: in al, dx
    test al, 0x20
    jz 16b
    mov edx, 0x3f8
    mov eax, edi
    out dx, al
    ret

.balign 8
12: .quad 0
    .quad 0x00af9b000000ffff        # code and data of ring 0
    .quad 0x00cf93000000ffff
    .quad 0x00cff3000000ffff        # data and code of ring 3
    .quad 0x00affb000000ffff
13: .word 39
    .quad 0
14: .asciz "round "
15: .asciz " wrong "
firecracker_guest_end:
.popsection
"#,
    stack = const STACK,
    pages = const PAGES,
    base = const BASE,
);
