package spec

import (
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// capabilities lists the capabilities in capabilities(7), in the kernel's order.
var capabilities = strings.Fields(`CAP_CHOWN CAP_DAC_OVERRIDE CAP_DAC_READ_SEARCH CAP_FOWNER CAP_FSETID CAP_KILL
	CAP_SETGID CAP_SETUID CAP_SETPCAP CAP_LINUX_IMMUTABLE CAP_NET_BIND_SERVICE CAP_NET_BROADCAST
	CAP_NET_ADMIN CAP_NET_RAW CAP_IPC_LOCK CAP_IPC_OWNER CAP_SYS_MODULE CAP_SYS_RAWIO CAP_SYS_CHROOT
	CAP_SYS_PTRACE CAP_SYS_PACCT CAP_SYS_ADMIN CAP_SYS_BOOT CAP_SYS_NICE CAP_SYS_RESOURCE CAP_SYS_TIME
	CAP_SYS_TTY_CONFIG CAP_MKNOD CAP_LEASE CAP_AUDIT_WRITE CAP_AUDIT_CONTROL CAP_SETFCAP
	CAP_MAC_OVERRIDE CAP_MAC_ADMIN CAP_SYSLOG CAP_WAKE_ALARM CAP_BLOCK_SUSPEND CAP_AUDIT_READ
	CAP_PERFMON CAP_BPF CAP_CHECKPOINT_RESTORE`)

// defaultCapabilities are docker's defaults.
var defaultCapabilities = strings.Fields(`CAP_CHOWN CAP_DAC_OVERRIDE CAP_FOWNER CAP_FSETID CAP_KILL CAP_SETGID
	CAP_SETUID CAP_SETPCAP CAP_NET_BIND_SERVICE CAP_NET_RAW CAP_SYS_CHROOT CAP_MKNOD CAP_AUDIT_WRITE
	CAP_SETFCAP`)

// capabilitySet applies --cap-add and --cap-drop to base, as docker does. Names may have the prefix CAP_ or not, in any
// case. ALL stands for the names in all. A capability that drop names is dropped even if add names it too.
func capabilitySet(base, add, drop, all []string) ([]string, error) {
	parse := func(names []string) (map[string]bool, bool, error) {
		set, every := map[string]bool{}, false
		for _, n := range names {
			c := strings.ToUpper(n)
			if c == "ALL" {
				every = true
				continue
			}
			if !strings.HasPrefix(c, "CAP_") {
				c = "CAP_" + c
			}
			if !slices.Contains(capabilities, c) {
				return nil, false, invalid("unknown capability %q", n)
			}
			set[c] = true
		}
		return set, every, nil
	}
	adds, addAll, err := parse(add)
	if err != nil {
		return nil, err
	}
	drops, dropAll, err := parse(drop)
	if err != nil {
		return nil, err
	}
	set := []string{}
	for _, c := range capabilities {
		have := adds[c] || addAll && slices.Contains(all, c) || slices.Contains(base, c) && !dropAll && !addAll
		if have && !drops[c] {
			set = append(set, c)
		}
	}
	return set, nil
}

// boundingSet lists the capabilities that this process can pass on. If the kernel or an outer container has removed
// some, a request for all of them would fail.
func boundingSet() []string {
	var set []string
	for i, c := range capabilities {
		if have, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, uintptr(i), 0, 0, 0); err == nil && have == 1 {
			set = append(set, c)
		}
	}
	return set
}
