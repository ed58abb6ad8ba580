#include "textflag.h"

// entry is where the process begins, if the linker is told so by -E. It notes which standard streams
// are closed, before Go's runtime opens /dev/null in their place, and goes on to the runtime.
TEXT ·entry(SB),NOSPLIT|NOFRAME,$0
	MOVD	$0, R19
next:
	MOVD	R19, R0
	MOVD	$1, R1 // F_GETFD
	MOVD	$25, R8 // fcntl
	SVC
	CMN	$9, R0 // -EBADF
	BNE	open
	MOVD	$·closed(SB), R2
	MOVD	$1, R3
	MOVB	R3, (R2)(R19)
open:
	ADD	$1, R19
	CMP	$3, R19
	BLT	next
	JMP	_rt0_arm64_linux(SB)
