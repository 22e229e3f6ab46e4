/* Where calls of the CUDA driver enter, and dlsym.
 *
 * A thunk names a function by its number and goes on to `common`: that asks qt_enter() where to go
 * (which waits while the gate is closed), calls there with the caller's arguments, those on the
 * stack copied, and tells qt_leave() what came of it. The driver's functions return a CUresult and
 * take at most six words in registers; two take a float.
 *
 * dlsym is jumped to, not called, where it is not ours to answer: glibc tells by the return
 * address who asks, which RTLD_NEXT depends on.
 */

#include "sizes.h"

	.text
	.globl	qt_thunks
	.hidden	qt_thunks
	.type	qt_thunks, @function
	.balign	16
qt_thunks:
	.set	number, 0
	.rept	QT_THUNKS
	.balign	QT_THUNK_SIZE, 0x90
	endbr64
	movl	$number, %r11d
	jmp	common
	.set	number, number + 1
	.endr
	.size	qt_thunks, . - qt_thunks

	/* What libcuda exports, by the same names: programs that are linked with it find these first. */
	.set	number, 0
	.macro	QT_FUNCTION name words
	.globl	\name
	.type	\name, @function
	.set	\name, qt_thunks + QT_THUNK_SIZE * number
	.set	number, number + 1
	.endm
#define QT_FUNCTION(name, words) QT_FUNCTION name words
#include "functions.h"
#undef QT_FUNCTION

	/* Frame, from %rbp down: 6 words of arguments, number, result, xmm0, xmm1 (32 octets). */
	.set	ARGUMENTS, -48
	.set	NUMBER, -56
	.set	RESULT, -64
	.set	FLOATS, -96
	.type	common, @function
	.balign	16
common:
	.cfi_startproc
	pushq	%rbp
	.cfi_def_cfa_offset 16
	.cfi_offset %rbp, -16
	movq	%rsp, %rbp
	.cfi_def_cfa_register %rbp
	subq	$96, %rsp
	movq	%rdi, ARGUMENTS(%rbp)
	movq	%rsi, ARGUMENTS+8(%rbp)
	movq	%rdx, ARGUMENTS+16(%rbp)
	movq	%rcx, ARGUMENTS+24(%rbp)
	movq	%r8, ARGUMENTS+32(%rbp)
	movq	%r9, ARGUMENTS+40(%rbp)
	movq	%r11, NUMBER(%rbp)
	movups	%xmm0, FLOATS(%rbp)
	movups	%xmm1, FLOATS+16(%rbp)
	movl	%r11d, %edi
	call	qt_enter		/* %rax: the function; %rdx: words on the stack, an even number */
	movq	%rax, %r11
	leaq	(,%rdx,8), %rcx
	subq	%rcx, %rsp
	testq	%rdx, %rdx
	jz	2f
1:	movq	8(%rbp,%rdx,8), %rax	/* the last word first */
	movq	%rax, -8(%rsp,%rdx,8)
	decq	%rdx
	jnz	1b
2:	movq	ARGUMENTS(%rbp), %rdi
	movq	ARGUMENTS+8(%rbp), %rsi
	movq	ARGUMENTS+16(%rbp), %rdx
	movq	ARGUMENTS+24(%rbp), %rcx
	movq	ARGUMENTS+32(%rbp), %r8
	movq	ARGUMENTS+40(%rbp), %r9
	movups	FLOATS(%rbp), %xmm0
	movups	FLOATS+16(%rbp), %xmm1
	call	*%r11
	leaq	-96(%rbp), %rsp
	movq	%rax, RESULT(%rbp)
	movl	NUMBER(%rbp), %edi
	leaq	ARGUMENTS(%rbp), %rsi
	movl	%eax, %edx
	call	qt_leave
	movq	RESULT(%rbp), %rax
	leave
	.cfi_def_cfa %rsp, 8
	ret
	.cfi_endproc
	.size	common, . - common

	.globl	dlsym
	.type	dlsym, @function
	.balign	16
dlsym:
	.cfi_startproc
	endbr64
	pushq	%rdi
	.cfi_adjust_cfa_offset 8
	pushq	%rsi
	.cfi_adjust_cfa_offset 8
	subq	$8, %rsp
	.cfi_adjust_cfa_offset 8
	call	qt_lookup		/* %rdx: whether %rax is the answer, or the real one's is */
	addq	$8, %rsp
	.cfi_adjust_cfa_offset -8
	popq	%rsi
	.cfi_adjust_cfa_offset -8
	popq	%rdi
	.cfi_adjust_cfa_offset -8
	testq	%rdx, %rdx
	jnz	3f
	jmp	*qt_real_dlsym(%rip)
3:	ret
	.cfi_endproc
	.size	dlsym, . - dlsym

	.section .note.GNU-stack, "", @progbits
