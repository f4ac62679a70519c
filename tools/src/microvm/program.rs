//! The program that runs on the vCPUs: hand-written, position-independent, ring 3.
//!
//! It does what [`crate::guest::ThreadsGuest`] does in Rust; the two change together.
//! Everything it needs to go on is in registers and in its control page, so a vCPU can
//! be stopped after any instruction. Invariant: between the increment of a page and
//! its counting lies exactly one instruction boundary, so that the instruction pointer
//! says whether an increment is in flight ([`progress`]).
//!
//! Registers, from the first instruction on: rbx control page, which fs is based on
//! too; rsp the end of that page. Set by the program: rdi doorbell, r8 worked pages,
//! r9 pages below the hole, r10 address of page 0, r11 bytes of the hole, rbp offset of
//! the lane, r12 next page, r13 random state, r14 operations done, r15 operations until
//! the next report, xmm6 the seed. Scratch: rax, rcx, rdx, rsi.

use std::arch::global_asm;
use std::ptr;

use kvm_bindings::kvm_regs;

use crate::guest::{VcpuProgress, Workload, control};
use crate::ram::GuestAddress;

/// Where the program lies in guest RAM.
pub(super) const ADDRESS: GuestAddress = GuestAddress(0x18_0000);

/// What is written to the doorbell at 0: operations done by this vCPU in all.
pub(super) const DOORBELL_OPERATIONS: u64 = 0;
/// At 8: the number of a page whose tag is wrong.
pub(super) const DOORBELL_WRONG_TAG: u64 = 8;
/// At 16: a register that did not hold what it should.
pub(super) const DOORBELL_WRONG_REGISTER: u64 = 16;

global_asm!(
    r#"
.pushsection .rodata.afterimage_guest, "a", @progbits
.balign 16
.code64

# rax: page number -> rax: its address. Clobbers rdx.
.macro AI_PAGE_ADDRESS
    xor edx, edx
    cmp rax, r9                     # above the MMIO hole?
    cmovae rdx, r11
    shl rax, 12
    add rax, r10
    add rax, rdx
.endm

# One step of xorshift64 on r13. Clobbers rax.
.macro AI_XORSHIFT
    mov rax, r13
    shl rax, 13
    xor r13, rax
    mov rax, r13
    shr rax, 7
    xor r13, rax
    mov rax, r13
    shl rax, 17
    xor r13, rax
.endm

# rax: page number -> the page that follows goes to r12.
.macro AI_NEXT_PAGE
    mov rax, r12
    inc r12
    cmp r12, r8
    jb 90f
    xor r12d, r12d
90:
.endm

# rax: address of a page -> its counter incremented, and the total after it.
.macro AI_COUNT in_flight
    inc qword ptr [rax + rbp + 8]
\in_flight:
    inc qword ptr [rbx + {writes}]
.endm

# rax: address of a page, rsi: its number -> tag compared. Clobbers rcx, rdx.
.macro AI_CHECK_TAG
    lea rcx, [rsi + 1]
    imul rcx, [rbx + {tag_multiplier}]
    mov rdx, rcx
    shr rdx, 29
    xor rcx, rdx
    cmp rcx, [rax + 2048]
    je 91f
    inc qword ptr [rbx + {errors}]
    mov [rdi + {wrong_tag}], rsi
91:
.endm

# Counts the operation; reports now and then; goes on at \again.
.macro AI_DONE again
    inc r14
    dec r15
    jnz \again
    call ai_report
    jmp \again
.endm

.global afterimage_guest_start
.hidden afterimage_guest_start
afterimage_guest_start:
    mov rdi, [rbx + {doorbell}]
    mov r8, [rbx + {worked_pages}]
    mov r9, [rbx + {low_pages}]
    mov r10, [rbx + {first_address}]
    mov r11, [rbx + {hole_bytes}]
    mov rbp, [rbx + {vcpu}]
    shl rbp, 6                      # lanes are 64 bytes
    xor r12d, r12d
    mov r13, [rbx + {seed}]
    movq xmm6, r13
    xor r14d, r14d
    mov r15, [rbx + {report_every}]
    mov rax, [rbx + {workload}]
    cmp rax, 1
    je ai_sequential
    cmp rax, 2
    je ai_random
    cmp rax, 3
    je ai_hot_set
    cmp rax, 4
    je ai_read_mostly
    cmp rax, 5
    je ai_mixed

ai_pattern:
    AI_NEXT_PAGE
    AI_PAGE_ADDRESS
    inc byte ptr [rax + rbp]
.global afterimage_guest_pattern_in_flight
.hidden afterimage_guest_pattern_in_flight
afterimage_guest_pattern_in_flight:
    AI_DONE ai_pattern

ai_sequential:
    AI_NEXT_PAGE
    AI_PAGE_ADDRESS
    AI_COUNT ai_sequential_in_flight
    AI_DONE ai_sequential

ai_random:
    AI_XORSHIFT
    mov rax, r13
    mul r8                          # the high half of random * pages
    mov rax, rdx
    AI_PAGE_ADDRESS
    AI_COUNT ai_random_in_flight
    AI_DONE ai_random

ai_hot_set:
    AI_XORSHIFT
    mov rax, r13
    test r13b, 15
    jz 1f
    mul qword ptr [rbx + {hot_pages}]
    imul rdx, [rbx + {hot_stride}]
    jmp 2f
1:  mul r8
2:  mov rax, rdx
    AI_PAGE_ADDRESS
    AI_COUNT ai_hot_set_in_flight
    AI_DONE ai_hot_set

ai_read_mostly:
    AI_XORSHIFT
    mov rax, r13
    mul r8
    mov rsi, rdx
    mov rax, rdx
    AI_PAGE_ADDRESS
    AI_CHECK_TAG
    test r13b, 31
    jnz 1f
    AI_COUNT ai_read_mostly_in_flight
1:  AI_DONE ai_read_mostly

ai_mixed:
    mov rcx, [rbx + {compute_steps}]
1:  AI_XORSHIFT
    dec rcx
    jnz 1b
    mov rax, r13
    mul r8
    mov rsi, rdx
    mov rax, rdx
    AI_PAGE_ADDRESS
    AI_CHECK_TAG
    AI_COUNT ai_mixed_in_flight
    AI_DONE ai_mixed

# Tells the host how many operations are done, and looks whether state that no
# operation depends on is still right: an SSE register, the base of fs.
ai_report:
    mov r15, [rbx + {report_every}]
    mov [rdi + {operations}], r14
    movq rax, xmm6
    cmp rax, [rbx + {seed}]
    jne 1f
    mov rax, fs:[{vcpu}]
    shl rax, 6
    cmp rax, rbp
    jne 1f
    ret
1:  mov [rdi + {wrong_register}], rax
    ret

.balign 8
.global afterimage_guest_end
.hidden afterimage_guest_end
afterimage_guest_end:

# Where the increments of each workload are in flight, by number of the workload.
.global afterimage_guest_in_flight
.hidden afterimage_guest_in_flight
afterimage_guest_in_flight:
    .4byte afterimage_guest_pattern_in_flight - afterimage_guest_start
    .4byte ai_sequential_in_flight - afterimage_guest_start
    .4byte ai_random_in_flight - afterimage_guest_start
    .4byte ai_hot_set_in_flight - afterimage_guest_start
    .4byte ai_read_mostly_in_flight - afterimage_guest_start
    .4byte ai_mixed_in_flight - afterimage_guest_start
.popsection
"#,
    vcpu = const control::VCPU,
    workload = const control::WORKLOAD,
    worked_pages = const control::WORKED_PAGES,
    first_address = const control::FIRST_ADDRESS,
    low_pages = const control::LOW_PAGES,
    hole_bytes = const control::HOLE_BYTES,
    report_every = const control::REPORT_EVERY,
    seed = const control::SEED,
    doorbell = const control::DOORBELL,
    hot_pages = const control::HOT_PAGES,
    hot_stride = const control::HOT_STRIDE,
    tag_multiplier = const control::TAG_MULTIPLIER,
    compute_steps = const control::COMPUTE_STEPS,
    writes = const control::WRITES,
    errors = const control::ERRORS,
    operations = const DOORBELL_OPERATIONS,
    wrong_tag = const DOORBELL_WRONG_TAG,
    wrong_register = const DOORBELL_WRONG_REGISTER,
);

unsafe extern "C" {
    static afterimage_guest_start: u8;
    static afterimage_guest_end: u8;
    static afterimage_guest_in_flight: [u32; 6];
}

/// The bytes of the program.
pub(super) fn code() -> &'static [u8] {
    let start = &raw const afterimage_guest_start;
    let end = &raw const afterimage_guest_end;
    // SAFETY: the assembly above defines both in one section, `end` after `start`, and
    // nothing ever writes in between.
    unsafe { std::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }
}

/// How far a stopped vCPU has come, by its registers.
pub(super) fn progress(workload: Workload, regs: &kvm_regs) -> VcpuProgress {
    // SAFETY: the assembly above defines the table, with an entry for each workload.
    let table = unsafe { ptr::read(&raw const afterimage_guest_in_flight) };
    let boundary = ADDRESS.0 + u64::from(table[workload.number() as usize]);
    VcpuProgress { operations: regs.r14, in_flight: regs.rip == boundary }
}
