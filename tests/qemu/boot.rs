//! The guest: a boot sector that writes and verifies more than 100 MiB, on one or two vCPUs.
//!
//! Each vCPU goes over all pages, again and again. In each round it compares the words that it
//! wrote in the round before and writes those of this one; they hold where they lie and the
//! number of the round, so that a page that is missing, old, or another's is found. After each
//! round it prints a line to the first serial port: a letter for the vCPU, how many rounds it
//! has done, and how many words were wrong so far, both in hexadecimal.
//!
//! A page has 16 words, one in each 256 bytes. One vCPU has all of them; of two, the first has
//! those in the first half of each page and the second the others, so that both fault on the
//! same pages.

use std::arch::global_asm;
use std::io;
use std::path::Path;

/// What is written, from here on: above what the firmware uses.
pub(crate) const BASE: u64 = 16 << 20;
pub(crate) const BYTES: u64 = 112 << 20;
/// Guest RAM, in MiB: the firmware has the end of it.
pub(crate) const MEMORY_MIB: u64 = 160;

const SECTOR: usize = 512;
/// A disk of one sector is too small for the firmware's geometry.
const DISK: usize = 1 << 20;

/// The image of the guest's disk.
pub(crate) fn write_disk(path: &Path, vcpus: usize) -> io::Result<()> {
    let mut disk = sector(vcpus);
    disk.resize(DISK, 0);
    std::fs::write(path, disk)
}

fn sector(vcpus: usize) -> Vec<u8> {
    let (start, end) = (&raw const qemu_guest_start, &raw const qemu_guest_end);
    // SAFETY: both lie in the same read-only section, the second behind the first.
    let code = unsafe { std::slice::from_raw_parts(start, end.offset_from(start) as usize) };
    let mut sector = code.to_vec();
    assert_eq!(sector.len(), SECTOR, "the code fits in a sector");
    // How much is skipped after the words of half a page.
    let skip: u32 = if vcpus == 1 { 0 } else { 2048 };
    let at = SECTOR - 6;
    sector[at..at + 4].copy_from_slice(&skip.to_le_bytes());
    sector
}

unsafe extern "C" {
    static qemu_guest_start: u8;
    static qemu_guest_end: u8;
}

global_asm!(
    r#"
.pushsection .rodata.qemu_guest, "a", @progbits
.balign 16
.global qemu_guest_start
.hidden qemu_guest_start
.global qemu_guest_end
.hidden qemu_guest_end

# The firmware loads this to 0x7c00. The first vCPU copies it to 0x8000, where the second
# starts; both then run it at 0x7c00, so all addresses are of there.
.set AT, 0x7c00
.set LOCK, 0x8800
.set SKIP, AT + 506

.code16
qemu_guest_start:
    cli
    xor ax, ax
    mov ds, ax
    in al, 0x92                     # the fast gate of address line 20
    or al, 2
    out 0x92, al
    .byte 0x0f, 0x01, 0x16          # lgdt
    .word AT + (gdt_pointer - qemu_guest_start)
    mov eax, cr0
    or al, 1
    mov cr0, eax
    .byte 0xea                      # to the flat code segment
    .word AT + (flat - qemu_guest_start)
    .word 8

.code32
flat:
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov ebx, dword ptr [0xfee00020] # the number of this vCPU
    shr ebx, 24
    mov esp, ebx
    shl esp, 12
    add esp, 0x9000
    test ebx, ebx
    jnz work

    mov dword ptr [LOCK], 0
    mov esi, AT
    mov edi, 0x8000
    mov ecx, 128
    rep movsd
    mov dword ptr [0xfee00300], 0xc4500     # INIT to all others
    mov ecx, 20000000
1:  dec ecx
    jnz 1b
    mov dword ptr [0xfee00300], 0xc4608     # they start at 0x8000

# ebx: this vCPU; ebp: rounds done; edi: wrong words.
work:
    xor ebp, ebp
    xor edi, edi
round:
    imul eax, ebp, 0x9e3779b1       # of the round before
    lea edx, [eax + 0x9e3779b1]     # of this one
    mov esi, ebx
    shl esi, 11
    add esi, {base}
2:  test ebp, ebp                   # nothing was written before the first
    jz 3f
    mov ecx, esi
    xor ecx, eax
    cmp dword ptr [esi], ecx
    je 3f
    inc edi
3:  mov ecx, esi
    xor ecx, edx
    mov dword ptr [esi], ecx
    add esi, 256
    test esi, 0x7ff
    jnz 4f
    add esi, dword ptr [SKIP]
4:  cmp esi, {end}
    jb 2b
    inc ebp

5:  mov eax, 1                      # one line at a time
    xchg dword ptr [LOCK], eax
    test eax, eax
    jz 6f
    pause
    jmp 5b
6:  mov al, 'A'
    add al, bl
    call put
    mov eax, ebp
    call put_number
    mov al, ' '
    call put
    mov eax, edi
    call put_number
    mov al, 10
    call put
    mov dword ptr [LOCK], 0
    jmp round

put_number:
    mov ecx, 8
7:  rol eax, 4
    push eax
    and al, 15
    cmp al, 10
    sbb al, 0x69                    # with das: a digit
    das
    call put
    pop eax
    dec ecx
    jnz 7b
    ret

put:
    push eax
    mov edx, 0x3fd
8:  in al, dx
    test al, 0x20
    jz 8b
    pop eax
    mov edx, 0x3f8
    out dx, al
    ret

.balign 8
gdt:
    .quad 0
    .quad 0x00cf9a000000ffff        # code, all of memory
    .quad 0x00cf92000000ffff        # data
gdt_pointer:
    .word gdt_pointer - gdt - 1
    .long AT + (gdt - qemu_guest_start)

.org qemu_guest_start + 506
skip:
    .long 0
    .byte 0x55, 0xaa
qemu_guest_end:
.code64
.popsection
"#,
    base = const BASE,
    end = const BASE + BYTES,
);
