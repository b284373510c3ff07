# Included by llama.cpp's src/CMakeLists.txt when GGML_KVQ is on: adds the glue and libkvq to the `llama` target.

set(KVQ_LIB "${KVQ_DIR}/target/release/libkvq.a" CACHE FILEPATH "kvq library (cargo build --release)")

foreach(file "${KVQ_DIR}/include/kvq.h" "${KVQ_LIB}")
    if (NOT EXISTS "${file}")
        message(FATAL_ERROR "kvq: ${file} not found: "
            "set KVQ_DIR to the kvq repository and run 'cargo build --release' there")
    endif()
endforeach()

set(KVQ_GLUE_SOURCES
    ${CMAKE_CURRENT_LIST_DIR}/kvq-attn.cpp
    ${CMAKE_CURRENT_LIST_DIR}/kvq-cache.cpp
    ${CMAKE_CURRENT_LIST_DIR}/kvq-choose.cpp
    ${CMAKE_CURRENT_LIST_DIR}/kvq-gpu.cpp
    ${CMAKE_CURRENT_LIST_DIR}/kvq-guard.cpp
    ${CMAKE_CURRENT_LIST_DIR}/kvq-log.cpp
    ${CMAKE_CURRENT_LIST_DIR}/kvq-observe.cpp
    ${CMAKE_CURRENT_LIST_DIR}/kvq-plan.cpp
    ${CMAKE_CURRENT_LIST_DIR}/kvq-profile.cpp
    ${CMAKE_CURRENT_LIST_DIR}/kvq-shift.cpp
    ${CMAKE_CURRENT_LIST_DIR}/kvq-state.cpp
    ${CMAKE_CURRENT_LIST_DIR}/kvq-state-io.cpp
    ${CMAKE_CURRENT_LIST_DIR}/kvq-state-seq-place.cpp
    ${CMAKE_CURRENT_LIST_DIR}/kvq-state-seq-read.cpp
    ${CMAKE_CURRENT_LIST_DIR}/kvq-state-seq-restore.cpp
    ${CMAKE_CURRENT_LIST_DIR}/kvq-state-seq-write.cpp
)

set_source_files_properties(${KVQ_GLUE_SOURCES} PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)

find_package(Threads REQUIRED)

target_sources            (llama PRIVATE ${KVQ_GLUE_SOURCES})
target_compile_definitions(llama PUBLIC GGML_USE_KVQ) # common and tools call llama_kvq_help
target_include_directories(llama PRIVATE ${KVQ_DIR}/include)
target_link_libraries     (llama PRIVATE ${KVQ_LIB} Threads::Threads ${CMAKE_DL_LIBS})
if (UNIX)
    target_link_libraries (llama PRIVATE m)
endif()

# A program of its own, beside llama.cpp's.
add_executable            (llama-kvq-calibrate ${CMAKE_CURRENT_LIST_DIR}/../calibrate/main.cpp)
target_include_directories(llama-kvq-calibrate PRIVATE ${CMAKE_CURRENT_LIST_DIR} ${KVQ_DIR}/include)
target_link_libraries     (llama-kvq-calibrate PRIVATE llama)
