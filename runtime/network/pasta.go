package network

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	goruntime "runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"distkit/disk"
	"distkit/disk/sys"
	"distkit/errclass"

	"github.com/containerd/errdefs"
	types "github.com/containernetworking/cni/pkg/types/100"
	"golang.org/x/sys/unix"
)

// Pasta is the name of the network that an ordinary user can have: the program pasta(1) passes on what the network sends and gets, by
// sockets of the user's. Each network has a pasta of its own.
const Pasta = "pasta"

// hostLoopback is the option of [Pasta] by which the gateway's address is the host's loopback interface.
const hostLoopback = "host-loopback"

// The addresses in each network of [Pasta]. They are not the host's own, as pasta's defaults are, so that the network
// reaches services of the host on these.
const (
	pastaNet      = "10.87.0.0/24"
	pastaAddress  = "10.87.0.2"
	pastaGateway  = "10.87.0.1"
	pastaDNS      = "10.87.0.3" // leads to the host's name server
	pastaAddress6 = "fd64:6973:746b:6975::2"
	pastaGateway6 = "fe80::1"
)

// pastaPid is the file of a network's directory into which pasta writes its process number.
const pastaPid = "pasta.pid"

// pasta is a network's connection by pasta(1).
type pasta struct {
	HostLoopback bool `json:"hostLoopback,omitempty"`
}

// parsePasta parses the name of a network: ok is false if it is not one of [Pasta].
func parsePasta(name string) (p *pasta, ok bool, err error) {
	name, option, has := strings.Cut(name, ":")
	switch {
	case name != Pasta:
		return nil, false, nil
	case has && option != hostLoopback:
		return nil, true, errclass.Errorf(errdefs.ErrInvalidArgument, "network %s:%s: the only option is %s", Pasta, option, hostLoopback)
	}
	return &pasta{HostLoopback: has}, true, nil
}

// check fails if the ports can't be had, or pasta can't run: NotImplemented, or PermissionDenied.
func (b *pasta) check(ports []Port) error {
	for _, p := range ports {
		if p.Protocol == "sctp" {
			return errclass.Errorf(errdefs.ErrNotImplemented, "port %q: pasta knows no SCTP", p)
		}
	}
	if !sys.InUserNamespace() && os.Geteuid() == 0 {
		return errclass.Errorf(errdefs.ErrNotImplemented, "network %s is for ordinary users: root has %s", Pasta, Bridge)
	}
	if _, err := exec.LookPath(Pasta); err != nil {
		return errclass.Errorf(errdefs.ErrNotImplemented, "network %s: pasta is not installed (Debian: passt)", Pasta)
	}
	// pasta's own message doesn't say what to do.
	switch tun, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0); {
	case errors.Is(err, fs.ErrNotExist):
		return errclass.Errorf(errdefs.ErrNotImplemented, "network %s: there is no /dev/net/tun; as root: modprobe tun", Pasta)
	case errors.Is(err, fs.ErrPermission):
		return errclass.Errorf(errdefs.ErrPermissionDenied, "network %s: /dev/net/tun is not for this user; as root: chmod 666 /dev/net/tun", Pasta)
	case err != nil:
		return err
	default:
		return tun.Close()
	}
}

// add starts pasta, which goes on in the background once the network is connected. [pasta.del] ends it: pasta's own watch over the
// file of the namespace is not relied on.
func (b *pasta) add(ctx context.Context, p place, r request) (*types.Result, error) {
	conf, _, err := resolvConf(r.Names, b)
	if err != nil {
		return nil, err
	}
	args := []string{"--quiet", "--config-net", "--ns-ifname", ifName, "--netns", p.file("netns"), "--pid", p.file(pastaPid),
		"--address", pastaAddress, "--netmask", pastaNet[strings.Index(pastaNet, "/")+1:], "--gateway", pastaGateway,
		"--address", pastaAddress6, "--gateway", pastaGateway6,
		"--no-dhcp", "--no-dhcpv6", "--no-ndp", "--no-ra", "--tcp-ns", "none", "--udp-ns", "none"}
	if !b.HostLoopback {
		args = append(args, "--no-map-gw")
	}
	if slices.Contains(strings.Fields(conf), pastaDNS) {
		args = append(args, "--dns-forward", pastaDNS)
	}
	for _, protocol := range []string{"tcp", "udp"} {
		flag, none := "--"+protocol+"-ports", true
		for _, port := range r.Ports {
			if port.Protocol != protocol {
				continue
			}
			leads := fmt.Sprintf("%d:%d", port.HostPort, port.ContainerPort)
			if port.HostIP != "" {
				leads = port.HostIP + "/" + leads
			}
			args, none = append(args, flag, leads), false
		}
		if none {
			args = append(args, flag, "none")
		}
	}
	if err := startPasta(ctx, args); err != nil {
		return nil, err
	}
	return pastaResult(p.file("netns"))
}

// startPasta runs pasta until it is in the background.
func startPasta(ctx context.Context, args []string) error {
	fd, err := unix.MemfdCreate("pasta", unix.MFD_CLOEXEC) // unlike a pipe, what goes on may keep it
	if err != nil {
		return err
	}
	output := os.NewFile(uintptr(fd), "pasta's output")
	defer output.Close()
	c := exec.CommandContext(ctx, Pasta, args...)
	c.Stdout, c.Stderr = output, output
	// Killed before it has written pasta's number down, this process takes pasta along. The kernel goes by the thread.
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	goruntime.LockOSThread()
	defer goruntime.UnlockOSThread()
	if err = c.Run(); err == nil || ctx.Err() != nil {
		return ctx.Err()
	}
	text, _ := io.ReadAll(io.NewSectionReader(output, 0, 64<<10))
	var said []string
	for line := range strings.Lines(string(text)) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasSuffix(line, " to syslog") { // of a host without one
			said = append(said, strings.TrimSuffix(line, "."))
		}
	}
	return fmt.Errorf("pasta: %w: %s", err, strings.Join(said, "; "))
}

// pastaResult returns the addresses that pasta gave the interface: those of IPv6 only if the host has it.
func pastaResult(netns string) (*types.Result, error) {
	var addrs []net.Addr
	done := make(chan error)
	go func() {
		goruntime.LockOSThread() // the thread ends with this goroutine, since nobody may run in its namespace
		done <- func() error {
			ns, err := os.Open(netns)
			if err != nil {
				return err
			}
			defer ns.Close()
			if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("enter %s: %w", netns, err)
			}
			link, err := net.InterfaceByName(ifName)
			if err == nil {
				addrs, err = link.Addrs()
			}
			return err
		}()
	}()
	if err := <-done; err != nil {
		return nil, err
	}
	result := &types.Result{CNIVersion: types.ImplementedSpecVersion, Interfaces: []*types.Interface{{Name: ifName, Sandbox: netns}}}
	for _, a := range addrs {
		ip, ok := a.(*net.IPNet)
		if !ok || !ip.IP.IsGlobalUnicast() {
			continue
		}
		config := &types.IPConfig{Interface: types.Int(0), Address: *ip, Gateway: net.ParseIP(pastaGateway6)}
		if ip.IP.To4() != nil {
			config.Gateway = net.ParseIP(pastaGateway)
		}
		result.IPs = append(result.IPs, config)
	}
	return result, nil
}

func (b *pasta) del(ctx context.Context, p place, _ request) error {
	if err := killPasta(p); err != nil {
		return fmt.Errorf("end pasta: %w", err)
	}
	return ctx.Err()
}

// killPasta ends the network's pasta and awaits its end. The number that it wrote may be another process's by now: pasta
// is the one whose arguments have the network's path.
func killPasta(p place) error {
	b, err := disk.Tree(p.dir).ReadFile(pastaPid, 32)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	pid, err := strconv.Atoi(string(bytes.TrimSpace(b)))
	if err != nil || pid <= 1 {
		return nil // it was killed before it wrote it
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	args, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil || !slices.Contains(strings.Split(string(args), "\x00"), p.file("netns")) {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil {
		if errors.Is(err, unix.ESRCH) {
			return nil
		}
		return err
	}
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 5000)
		switch {
		case errors.Is(err, unix.EINTR):
		case err == nil && n == 0:
			return errclass.Errorf(errdefs.ErrUnavailable, "process %d has been killed, and goes on", pid)
		default:
			return err
		}
	}
}
