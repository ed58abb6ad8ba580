// Tiny is the only program in the small test image. It does a small part of what redis does, so that tests can start
// it, ask it and stop it, and it can print how it was started. The name it was called by, or else its first argument,
// says what it does.
package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"
)

func main() {
	args := os.Args
	args[0] = args[0][strings.LastIndexByte(args[0], '/')+1:]
	if args[0] == "tiny" {
		args = args[1:]
	}
	if len(args) == 0 {
		args = []string{"info"}
	}
	if err := run(args[0], args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", args[0], err)
		os.Exit(1)
	}
}

func run(name string, args []string) error {
	switch name {
	case "server", "redis-server":
		return server(args)
	case "redis-cli":
		return cli(args)
	case "ping":
		return cli(append(args, "ping"))
	case "info":
		return info(args)
	case "echo":
		_, err := fmt.Println(strings.Join(args, " "))
		return err
	case "cat":
		return cat(args)
	case "env":
		_, err := fmt.Println(strings.Join(os.Environ(), "\n"))
		return err
	case "true":
		return nil
	case "exit":
		n, err := strconv.Atoi(arg(args, 0, "0"))
		if err != nil {
			return err
		}
		os.Exit(n)
	case "sleep":
		return sleep(args)
	case "write":
		return os.WriteFile(arg(args, 0, "out"), []byte(arg(args, 1, "")+"\n"), 0o644)
	}
	return fmt.Errorf("no such command: one of server, ping, info, echo, cat, env, true, exit, sleep, write")
}

func arg(args []string, i int, otherwise string) string {
	if i < len(args) {
		return args[i]
	}
	return otherwise
}

// address understands redis's own options, for a Unix socket or for a port on all addresses.
func address(args []string) (network, addr string, rest []string, err error) {
	network, addr = "tcp", ":6379"
	for i := 0; i < len(args); i++ {
		switch args[i] {
		case "--unixsocket", "-s":
			network, addr = "unix", arg(args, i+1, "")
		case "--port", "-p":
			network, addr = "tcp", ":"+arg(args, i+1, "")
		case "--save", "--appendonly", "--dir", "--bind", "--daemonize":
		default:
			rest = append(rest, args[i])
			continue
		}
		if i++; i >= len(args) {
			return "", "", nil, fmt.Errorf("%s needs a value", args[i-1])
		}
	}
	return network, addr, rest, nil
}

func server(args []string) error {
	network, addr, rest, err := address(args)
	if err != nil {
		return err
	}
	for _, a := range rest {
		if a == "--version" || a == "-v" {
			_, err := fmt.Println("Redis server v=7.0.0 (tiny)")
			return err
		}
	}
	listener, err := net.Listen(network, addr)
	if err != nil {
		return err
	}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT)
	go func() {
		<-stop
		listener.Close()
	}()
	fmt.Println("Ready to accept connections")
	for {
		conn, err := listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			fmt.Println("bye bye...")
			return nil
		}
		if err != nil {
			return err
		}
		go serve(conn)
	}
}

// serve understands both of redis's forms of a command: a line, and an array of strings.
func serve(conn net.Conn) {
	defer conn.Close()
	in := bufio.NewReader(conn)
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			return
		}
		line = strings.TrimSpace(line)
		if n, array := strings.CutPrefix(line, "*"); array {
			count, _ := strconv.Atoi(n)
			var words []string
			for range count * 2 {
				word, err := in.ReadString('\n')
				if err != nil {
					return
				}
				if word[0] != '$' {
					words = append(words, strings.TrimSpace(word))
				}
			}
			line = strings.Join(words, " ")
		}
		answer := "-ERR unknown command"
		if strings.EqualFold(line, "ping") {
			answer = "+PONG"
		}
		if _, err := io.WriteString(conn, answer+"\r\n"); err != nil {
			return
		}
	}
}

func cli(args []string) error {
	network, addr, rest, err := address(args)
	if err != nil {
		return err
	}
	conn, err := net.Dial(network, addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := fmt.Fprintf(conn, "%s\r\n", strings.Join(rest, " ")); err != nil {
		return err
	}
	answer, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil {
		return err
	}
	_, err = fmt.Println(strings.TrimLeft(strings.TrimSpace(answer), "+-"))
	return err
}

// info prints the environment of the process, one fact per line, with the arguments last.
func info(args []string) error {
	cwd, err := os.Getwd()
	if err != nil {
		return err
	}
	groups, err := os.Getgroups()
	if err != nil {
		return err
	}
	host, err := os.Hostname()
	if err != nil {
		return err
	}
	fmt.Printf("cwd %s\nuid %d\ngid %d\ngroups %v\nhostname %s\npid %d\n", cwd, os.Getuid(), os.Getgid(), groups, host, os.Getpid())
	for _, e := range os.Environ() {
		fmt.Println("env", e)
	}
	for _, a := range args {
		fmt.Println("arg", a)
	}
	return nil
}

func cat(args []string) error {
	if len(args) == 0 {
		_, err := io.Copy(os.Stdout, os.Stdin)
		return err
	}
	for _, a := range args {
		f, err := os.Open(a)
		if err != nil {
			return err
		}
		_, err = io.Copy(os.Stdout, f)
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
	return nil
}

// sleep prints that it waits, waits, and prints the signal that ended it. Its status is 128 plus the number of the
// signal.
func sleep(args []string) error {
	d, err := time.ParseDuration(arg(args, 0, "1h"))
	if err != nil {
		return err
	}
	got := make(chan os.Signal, 1)
	signal.Notify(got, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGUSR1)
	fmt.Println("sleeping")
	select {
	case s := <-got:
		fmt.Println("got", s)
		os.Exit(128 + int(s.(syscall.Signal)))
	case <-time.After(d):
	}
	return nil
}
