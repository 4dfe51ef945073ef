// Anchor of the exposition: client_golang with GaugeVecs of the series in bench/series.py.
//
// usage: exporter SERIES    prints its URL
package main

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"strconv"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

var (
	families = []string{"bench_instances", "bench_seconds", "bench_last_end_seconds", "bench_hosts"}
	labels   = []string{"bk_scope_type", "bk_scope_id", "task_type", "launch_mode", "status"}
	statuses = []string{"pending", "running", "success", "failed", "skipped", "ignored", "waiting_user", "ended", "abnormal",
		"stopping", "stopped", "confirm_stop", "dropped", "rolling_wait"}
)

func value(family, owner, index uint32) float64 {
	mixed := (family*1000003 + owner*7919 + index*104729) * 2654435761
	power := uint32(10)
	for i := uint32(0); i < mixed%7; i++ {
		power *= 10
	}
	return float64(mixed % power)
}

func main() {
	series, _ := strconv.Atoi(os.Args[1])
	var sets [][3]string
	for _, taskType := range []string{"job", "script", "file"} {
		for _, mode := range []string{"web", "api", "cron"} {
			for _, status := range statuses {
				sets = append(sets, [3]string{taskType, mode, status})
			}
		}
	}
	registry := prometheus.NewRegistry()
	for f, name := range families {
		gauge := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: name, Help: "Help of " + name + "."}, labels)
		registry.MustRegister(gauge)
		for owner := 0; owner < series/100; owner++ {
			for i := 0; i < 25; i++ {
				set := sets[i*5]
				gauge.WithLabelValues("biz", strconv.Itoa(2000000+7*owner), set[0], set[1], set[2]).
					Set(value(uint32(f), uint32(owner), uint32(i)))
			}
		}
	}
	http.Handle("/metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{EnableOpenMetrics: true}))
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	fmt.Printf("http://%s\n", listener.Addr())
	panic(http.Serve(listener, nil))
}
