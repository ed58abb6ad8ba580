package network

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"distkit/disk"
	"distkit/runtime"

	"github.com/containernetworking/cni/libcni"
	"golang.org/x/sys/unix"
)

// hostDir has what the networks of all state directories share: the leases of [Bridge], and its lock.
const hostDir = "/run/distkit"

// using locks the host's bridge, so that no other process removes it while it is used.
func using(ctx context.Context, r request) (release func(), err error) {
	if !r.onBridge() {
		return func() {}, nil
	}
	lock, err := lockBridge(ctx, unix.LOCK_SH)
	if err != nil {
		return nil, err
	}
	return func() { _ = lock.Close() }, nil
}

func lockBridge(ctx context.Context, how int) (*os.File, error) {
	if err := runtime.PrivateDir(hostDir); err != nil {
		return nil, err
	}
	return disk.LockFile(ctx, filepath.Join(hostDir, "bridge.lock"), os.O_RDWR|os.O_CREATE, 0o600, how)
}

// tidy cleans up the host if the network that was just disconnected was the last one on the bridge: it removes the
// bridge, and chains of iptables that CNI's plugins have left empty. If another process uses the bridge, tidy leaves
// that to it. Errors are ignored: what remains does no harm, and the next network uses it.
func tidy(ctx context.Context, r request) {
	if !r.onBridge() {
		return
	}
	lock, err := lockBridge(ctx, unix.LOCK_EX|unix.LOCK_NB)
	if err != nil {
		return
	}
	defer lock.Close()
	index, ports, err := lookupBridge(bridgeLink)
	if err != nil || ports > 0 {
		return
	}
	if index > 0 && removeBridge(bridgeLink) != nil {
		return
	}
	for _, command := range []string{"iptables", "ip6tables"} {
		rules, err := exec.CommandContext(ctx, command+"-save").Output()
		if err != nil {
			continue // not installed, or the kernel does not support the family
		}
		if change := withoutIdleChains(string(rules)); change != "" {
			c := exec.CommandContext(ctx, command+"-restore", "--noflush", "--wait")
			c.Stdin = strings.NewReader(change)
			_ = c.Run()
		}
	}
}

// lookupBridge returns the index of the bridge, or 0 if there is none, and the number of its ports.
func lookupBridge(name string) (index, ports int, err error) {
	rib, err := syscall.NetlinkRIB(syscall.RTM_GETLINK, syscall.AF_UNSPEC)
	if err != nil {
		return 0, 0, fmt.Errorf("list interfaces: %w", err)
	}
	messages, err := syscall.ParseNetlinkMessage(rib)
	if err != nil {
		return 0, 0, fmt.Errorf("list interfaces: %w", err)
	}
	masters := map[int]int{}
	for _, m := range messages {
		if m.Header.Type != syscall.RTM_NEWLINK || len(m.Data) < syscall.SizeofIfInfomsg {
			continue
		}
		attrs, err := syscall.ParseNetlinkRouteAttr(&m)
		if err != nil {
			return 0, 0, fmt.Errorf("list interfaces: %w", err)
		}
		for _, a := range attrs {
			switch {
			case a.Attr.Type == unix.IFLA_IFNAME && string(bytes.TrimRight(a.Value, "\x00")) == name:
				index = int(binary.NativeEndian.Uint32(m.Data[4:8]))
			case a.Attr.Type == unix.IFLA_MASTER && len(a.Value) == 4:
				masters[int(binary.NativeEndian.Uint32(a.Value))]++
			}
		}
	}
	return index, masters[index], nil
}

// withoutIdleChains returns input for iptables-restore that removes the chains of CNI's portmap and firewall plugins
// unless another network uses them. rules is the output of iptables-save after the bridge is gone. The result is "" if
// there is nothing to remove. Rules of the firewall plugin for addresses of the bridge are removed in any case. The
// plugin finds them by its own earlier result, so it leaves those of a run-net that was killed before it had the
// result.
func withoutIdleChains(rules string) string {
	var b strings.Builder
	for _, table := range []struct {
		name   string
		chains []string // the first chain has the rules of the networks
	}{
		{"nat", []string{"CNI-HOSTPORT-DNAT", "CNI-HOSTPORT-SETMARK", "CNI-HOSTPORT-MASQ"}},
		{"filter", []string{"CNI-FORWARD", publishChain}},
	} {
		_, text, _ := strings.Cut("\n"+rules, "\n*"+table.name+"\n")
		text, _, _ = strings.Cut(text, "\nCOMMIT\n")
		idle, unneeded := idleChains(text, table.chains)
		if len(idle)+len(unneeded) == 0 {
			continue
		}
		fmt.Fprintf(&b, "*%s\n", table.name)
		for _, rule := range unneeded {
			fmt.Fprintf(&b, "-D %s\n", rule)
		}
		for _, command := range []string{"-F", "-X"} {
			for _, chain := range idle {
				fmt.Fprintf(&b, "%s %s\n", command, chain)
			}
		}
		b.WriteString("COMMIT\n")
	}
	return b.String()
}

// idleChains returns the chains of a table that no network uses, and rules that are no longer needed: jumps to idle
// chains, and those for addresses of the bridge.
func idleChains(table string, chains []string) (idle, unneeded []string) {
	var jumps []string // from the kernel's chains to these
	used := false
	for line := range strings.SplitSeq(table, "\n") {
		words := append(strings.Fields(line), "", "")
		if chain, ok := strings.CutPrefix(words[0], ":"); ok && slices.Contains(chains, chain) {
			idle = append(idle, chain)
		}
		rule, ok := strings.CutPrefix(line, "-A ")
		if !ok {
			continue
		}
		_, to, _ := strings.Cut(rule, " -j ")
		to, _, _ = strings.Cut(to, " ")
		from, leads := words[1], slices.Contains(chains, to)
		switch {
		case leads && builtin(from):
			jumps = append(jumps, rule)
		case from == chains[0] && !leads && ofBridge(words):
			unneeded = append(unneeded, rule)
		case from == publishChain && strings.Contains(rule, ofPublished):
		case leads && !slices.Contains(chains, from), (from == chains[0] || from == publishChain) && !leads:
			used = true
		}
	}
	if used {
		return nil, unneeded
	}
	return idle, append(jumps, unneeded...)
}

// ofBridge reports whether a rule is for an address of the bridge.
func ofBridge(rule []string) bool {
	for i, word := range rule[:len(rule)-1] {
		p, err := netip.ParsePrefix(rule[i+1])
		if err == nil && (word == "-s" || word == "-d") &&
			(netip.MustParsePrefix(Subnet).Contains(p.Addr()) || netip.MustParsePrefix(Subnet6).Contains(p.Addr())) {
			return true
		}
	}
	return false
}

// builtin reports whether a chain is one of the kernel's, which has rules for all networks.
func builtin(chain string) bool {
	return slices.Contains([]string{"PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"}, chain)
}

// forwardPublished lets connections from other hosts to published ports reach the bridge. The firewall plugin allows
// only connections that begin in a network. If it has made no chain, because firewalld manages the host's rules, there
// is nothing to do. The caller holds the lock of all networks.
func forwardPublished(ctx context.Context, n *Network) error {
	if n.Name != bridgeName || len(n.Ports) == 0 {
		return nil
	}
	commands := []string{"iptables"}
	if slices.ContainsFunc(n.Addresses, func(a string) bool { return strings.Contains(a, ":") }) {
		commands = append(commands, "ip6tables")
	}
	for _, command := range commands {
		rules, err := exec.CommandContext(ctx, command, "--wait", "--list-rules", publishChain).Output()
		if err != nil || strings.Contains(string(rules), ofPublished) {
			continue
		}
		out, err := exec.CommandContext(ctx, command, "--wait", "--append", publishChain, "--out-interface", bridgeLink,
			"--match", "conntrack", "--ctstate", "DNAT", "--jump", "ACCEPT").CombinedOutput()
		if err != nil {
			return fmt.Errorf("%s: %w: %s", command, err, strings.Join(strings.Fields(string(out)), " "))
		}
	}
	return nil
}

// defaultLeases is where CNI's host-local plugin keeps its leases by default. It is a variable for tests.
var defaultLeases = "/var/lib/cni/networks"

// sweepLeases frees addresses that host-local has leased to networks that are gone: this one, because the plugin would
// refuse it another lease, and networks from before the boot, because their leases would use up the addresses. A lease
// is a file with two lines: the ID that the plugin was given, and the name of the interface. Leases of other programs
// are kept.
func (n *Networks) sweepLeases(ctx context.Context, p place, r request, config *libcni.NetworkConfigList) error {
	mine := r.runtimeConf(p).ContainerID
	for _, plugin := range config.Plugins {
		var c struct {
			IPAM struct {
				Type    string `json:"type"`
				DataDir string `json:"dataDir"`
			} `json:"ipam"`
		}
		if json.Unmarshal(plugin.Bytes, &c) != nil || c.IPAM.Type != "host-local" {
			continue
		}
		dir := c.IPAM.DataDir
		if dir == "" {
			dir = defaultLeases
		}
		stale, err := n.staleLeases(filepath.Join(dir, config.Name), mine)
		if err != nil {
			return fmt.Errorf("look for stale leases: %w", err)
		}
		for _, id := range stale {
			if err := n.cni(p).DelNetworkList(ctx, config, &libcni.RuntimeConf{ContainerID: id, IfName: ifName}); err != nil {
				return fmt.Errorf("give back the lease of %s: %w", id, pluginError(ctx, err))
			}
		}
	}
	return nil
}

// staleLeases returns the IDs that have a lease in dir but no network: mine, and those of this program's networks whose
// lease is older than the boot.
func (n *Networks) staleLeases(dir, mine string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var up unix.Sysinfo_t
	if err := unix.Sysinfo(&up); err != nil {
		return nil, err
	}
	boot := time.Now().Add(-time.Duration(up.Uptime+1) * time.Second)
	var stale []string
	for _, e := range entries {
		id, leased, ok := readLease(filepath.Join(dir, e.Name()))
		if !ok || slices.Contains(stale, id) || id != mine && !leased.Before(boot) {
			continue
		}
		namespace, network, ok := strings.Cut(id, "--")
		key, err := runtime.Key(namespace, network)
		if !ok || err != nil {
			continue // made by another program
		}
		if _, err := os.Lstat(filepath.Join(n.dir, key, "result.json")); id == mine || errors.Is(err, fs.ErrNotExist) {
			stale = append(stale, id)
		}
	}
	return stale, nil
}

// readLease reads the file of a lease: the ID that holds it, and the time of the lease.
func readLease(name string) (id string, leased time.Time, ok bool) {
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return "", leased, false
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return "", leased, false
	}
	b, err := io.ReadAll(io.LimitReader(f, 1<<10))
	if err != nil {
		return "", leased, false
	}
	id, name, ok = strings.Cut(strings.TrimSpace(string(b)), "\n")
	return strings.TrimSpace(id), info.ModTime(), ok && name == ifName
}
